"""Formats of few bits (quant/mx.py) and messages of them in plain torch: any device.

Bit for bit what the native kernels and the oracle give: every step is exact or one rounding of float32.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import message, mx
from ..spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, Op

INFINITY = 0x7F800000


# --------------------------------------------------------------------------------------- pack and unpack
def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (..., n), both uint8."""
    e = mx.check_pack(a.x, a.element, a.block, a.scale, a.search)
    n = a.x.shape[-1]
    blocks = -(-n // a.block)
    x = F.pad(a.x.float(), (0, blocks * a.block - n)).unflatten(-1, (blocks, a.block))
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    amax = magnitude.amax(-1) if n else magnitude.new_zeros(x.shape[:-1])
    valid = amax < INFINITY
    x, amax = torch.where(valid[..., None], x, 0.0), torch.where(valid, amax, 0)
    choose = _fine_scales if a.scale in mx.FINE else _power_scales
    codes, scales = choose(x, amax, valid, e, a.scale, a.search)
    return _pack_bits(codes.flatten(-2)[..., :n], e.bits), scales


def _power_scales(
    x: Tensor, amax: Tensor, valid: Tensor, e: mx.MxElement, scale: str, search: bool
) -> tuple[Tensor, Tensor]:
    """Codes (..., blocks, block) and scale bytes (..., blocks), E8M0."""
    exponent, mantissa = _exponent(amax)
    exponent = exponent - e.emax + (mantissa > e.carry_above(scale)).int()
    exponent = exponent.clamp(-127, 127).masked_fill_(amax == 0, -127)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in mx.CANDIDATES[scale] if search else (1.0,):
        tried = (exponent + int(math.log2(factor))).clamp(-127, 127)
        scaled = _times_power(x, -tried[..., None])
        best = _better(best, tried, scaled, _power(tried - exponent), e)
    assert best is not None
    scales = (best[0] + mx.SCALE_BIAS).masked_fill_(~valid, mx.SCALE_NAN)
    return best[1], scales.to(torch.uint8)


def _fine_scales(
    x: Tensor, amax: Tensor, valid: Tensor, e: mx.MxElement, scale: str, search: bool
) -> tuple[Tensor, Tensor]:
    """The same with a power of two for each row and a small float for each block."""
    fine = mx.FINE[scale]
    row = amax.amax(-1, keepdim=True) if amax.shape[-1] else amax.new_zeros((*amax.shape[:-1], 1))
    k = (_exponent(row)[0] - e.emax - fine.top).clamp(-127, 127).masked_fill_(row == 0, -127)
    largest = _times_power(amax.view(torch.float32), -k)
    inside = _times_power(x, -k[..., None])
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for factor in mx.CANDIDATES[scale] if search else (1.0,):
        wanted = largest * torch.tensor(factor / e.max_value, dtype=torch.float32, device=x.device)
        code = _round_scale(wanted, scale)
        s = _scale_value(code, scale)
        inverse = torch.where(s == 0, 0.0, 1 / s)
        best = _better(best, code, inside * inverse[..., None], s, e)
    assert best is not None
    code = torch.where(valid, best[0], fine.nan)
    parts = torch.stack([(code >> 8 * i) & 255 for i in range(fine.bytes)], -1).flatten(-2)
    return best[1], torch.cat((k + mx.SCALE_BIAS, parts), -1).to(torch.uint8)


def _better(
    best: tuple[Tensor, Tensor, Tensor] | None, scale: Tensor, scaled: Tensor, value: Tensor, e: mx.MxElement
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, codes, cost) of ``best`` or, where its cost is lower, of this candidate."""
    codes, rounded = _encode(scaled, e)
    error = ((rounded - scaled.abs()).abs() / e.error_unit).clamp(max=mx.ERROR_MAX).round().int()
    cost = error.square().sum(-1).float() * (value * value)
    if best is None:
        return scale, codes, cost
    lower = cost < best[2]
    return (
        torch.where(lower, scale, best[0]),
        torch.where(lower[..., None], codes, best[1]),
        torch.where(lower, cost, best[2]),
    )


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n), computed in float32 and rounded once to ``dtype``."""
    mx.check_unpack(a.codes, a.scales, a.element, a.block, a.n, a.dtype, a.scale)
    return _unpack(a.codes, a.scales, a.element, a.block, a.n, a.scale).to(a.dtype)


def _unpack(data: Tensor, scales: Tensor, element: str, block: int, n: int, scale: str) -> Tensor:
    codes = _unpack_bits(data, mx.element(element).bits, n).long()
    values = mx.decode_table(element).to(codes.device)[codes]
    if scale in mx.FINE:
        width = mx.FINE[scale].bytes
        k, parts = scales[..., :1].int(), scales[..., 1:].unflatten(-1, (-(-n // block), width)).int()
        code = (parts << torch.arange(0, 8 * width, 8, device=parts.device)).sum(-1)
        s = _scale_value(code.int(), scale).repeat_interleave(block, dim=-1)[..., :n]
        # The product of an element and s is exact.
        values, k = values * s, k.expand(values.shape)
    else:
        k = scales.repeat_interleave(block, dim=-1)[..., :n].int()
    return torch.where(k == mx.SCALE_NAN, torch.nan, _times_power(values, k - mx.SCALE_BIAS))


def _exponent(bits: Tensor) -> tuple[Tensor, Tensor]:
    """floor(log2) and 23 mantissa bits of positive floats given as bits."""
    # A subnormal is m * 2^-149: m's own exponent and mantissa, as a float, normalise it.
    normal = torch.where(bits < 0x800000, bits.float().view(torch.int32) - (149 << 23), bits)
    return (normal >> 23) - 127, normal & 0x7FFFFF


def _power(exponent: Tensor) -> Tensor:
    """2^exponent of a normal float."""
    return ((exponent + 127) << 23).view(torch.float32)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2^exponent``, |exponent| <= 128, by two normal factors: neither flushes nor overflows early."""
    half = exponent >> 1
    return x * _power(half) * _power(exponent - half)


def _encode(x: Tensor, e: mx.MxElement) -> tuple[Tensor, Tensor]:
    """Code (int32) and magnitude of the element nearest to each scaled value: ties to even, saturating."""
    bits, magnitude = x.view(torch.int32), x.abs()
    if e.exponent_bits:
        # The element's own step at |x|: 2^(exponent - mantissa_bits), no finer than that of subnormals.
        lowest = 1 - e.bias
        exponent = (((bits >> 23) & 255) - 127).clamp(lowest)
        steps = (magnitude * _power(e.mantissa_bits - exponent)).round()
        code = (steps.int() + ((exponent - lowest) << e.mantissa_bits)).clamp(max=e.max_code)
        rounded = (steps * _power(exponent - e.mantissa_bits)).clamp(max=e.max_value)
        return code | ((bits < 0).int() << (e.bits - 1)), rounded
    unit = 1 << e.mantissa_bits
    steps = (magnitude * unit).round().clamp(max=e.max_code)
    return torch.where(bits < 0, -steps, steps).int() & ((1 << e.bits) - 1), steps / unit


def _round_scale(s: Tensor, scale: str) -> Tensor:
    """Code (int32) of the scale nearest to s >= 0."""
    if scale == "e4m3":
        return _encode(s, mx.element("e4m3"))[0]
    return s.half().view(torch.int16).int() & 0xFFFF


def _scale_value(code: Tensor, scale: str) -> Tensor:
    if scale == "e4m3":
        return mx.decode_table("e4m3").to(code.device)[code.long()]
    return code.to(torch.int16).view(torch.float16).float()


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) to bytes: eight codes fill ``bits`` bytes."""
    n = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8)
    eights = F.pad(codes, (0, -n % 8)).unflatten(-1, (-(-n // 8), 8)).long()
    word = (eights << torch.arange(0, 8 * bits, bits, device=codes.device)).sum(-1, keepdim=True)
    out = (word >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 255
    return out.flatten(-2)[..., : (n * bits + 7) // 8].to(torch.uint8)


def _unpack_bits(data: Tensor, bits: int, n: int) -> Tensor:
    if bits == 8:
        return data
    words = -(-n // 8)
    groups = F.pad(data, (0, words * bits - data.shape[-1])).unflatten(-1, (words, bits)).long()
    word = (groups << torch.arange(0, 8 * bits, 8, device=data.device)).sum(-1, keepdim=True)
    out = (word >> torch.arange(0, 8 * bits, bits, device=data.device)) & ((1 << bits) - 1)
    return out.flatten(-2)[..., :n]


# ----------------------------------------------------------------------------------------------- messages
def encode(a: EncodeArgs) -> Tensor:
    """The message of x (rows, hidden), uint8 (Layout.nbytes,)."""
    rows, hidden = a.x.shape
    layout = message.Layout.of(rows, hidden, a.element, a.block, a.scale, a.outliers)
    kept, outliers = _channels(hidden, a.outliers, a.x.device)
    x = a.x.float()[:, kept] if a.outliers else a.x.float()
    packed = mx_pack(MxPackArgs(rotate(x, a.rotate), a.element, a.block, a.scale, a.search))
    out = a.x.new_empty(layout.nbytes, dtype=torch.uint8)
    values = a.x[:, outliers].bfloat16().view(torch.uint8)
    for span, part in zip(layout.spans, (*packed, values), strict=True):
        out[span] = part.flatten()
    return out


def decode_sum(a: DecodeSumArgs) -> Tensor:
    """The sum of the messages (rows, hidden): float32, in their order, rounded once to ``dtype``."""
    layout = message.Layout.of(a.rows, a.hidden, a.element, a.block, a.scale, a.outliers)
    device = a.messages[0].device
    kept, outliers = _channels(a.hidden, a.outliers, device)
    total, exact = _decode(a, a.messages[0], layout)
    for m in a.messages[1:]:
        values, channels = _decode(a, m, layout)
        total, exact = total + values, exact + channels
    out = a.out if a.out is not None else torch.empty((a.rows, a.hidden), dtype=a.dtype, device=device)
    out[:, kept] = rotate(total, a.rotate).to(a.dtype)
    out[:, outliers] = exact.to(a.dtype)
    return out


def _decode(a: DecodeSumArgs, data: Tensor, layout: message.Layout) -> tuple[Tensor, Tensor]:
    codes, scales, outliers = (data[span] for span in layout.spans)
    codes, scales = codes.view(a.rows, layout.code_bytes), scales.view(a.rows, layout.scale_bytes)
    # A copy: bfloat16 must begin at an even byte.
    channels = outliers.clone().view(torch.bfloat16).view(a.rows, len(a.outliers)).float()
    return _unpack(codes, scales, a.element, a.block, layout.kept, a.scale), channels


@lru_cache(maxsize=256)
def _channels(hidden: int, outliers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the channels that are quantized, and of the outliers."""
    quantized = torch.ones(hidden, dtype=torch.bool)
    index = torch.tensor(outliers, dtype=torch.int64)
    quantized[index] = False
    return quantized.nonzero().flatten().to(device), index.to(device)


def rotate(x: Tensor, length: int) -> Tensor:
    """The rotation of quant/message.py of every row of x (rows, n)."""
    whole = x.shape[1] // length * length if length else 0
    if not whole:
        return x
    blocks, step = x[:, :whole], 1
    while step < length:
        pairs = blocks.reshape(x.shape[0], whole // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks, step = torch.stack((first + second, first - second), 2), 2 * step
    factor = torch.tensor(length**-0.5, dtype=torch.float32, device=x.device)
    return torch.cat((blocks.reshape(x.shape[0], whole) * factor, x[:, whole:]), 1)


FEATURES = frozenset({"even", "ceil", "e4m3", "fp16", "search", "rotate", "outliers"})
OPS: dict[str, Op] = {
    "mx_pack": Op(mx_pack, FEATURES),
    "mx_unpack": Op(mx_unpack, FEATURES),
    "encode": Op(encode, FEATURES),
    "decode_sum": Op(decode_sum, FEATURES),
}
