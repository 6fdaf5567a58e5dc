"""Every op but attention in plain torch: any device, any dtype the records allow.

Arithmetic is float32, rounded once to the result's dtype. Indices on an accelerator are not read back:
a slot or position out of range is skipped or clamped there, unless FASTATTN_STRICT asks for the check.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant import mx, packed
from ..settings import settings
from ..spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    MxPackArgs,
    MxUnpackArgs,
    Op,
    OpSignature,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)

# Values of a dequantized tile of a large weight: 64 MB in float32.
TILE = 1 << 24


def check_indices(index: Tensor, name: str, size: int, lowest: int = 0) -> None:
    """Raises ValueError for an index outside ``lowest..size - 1``; on an accelerator only when strict."""
    if index.numel() and (settings.strict or index.device.type == "cpu"):
        lo, hi = (int(v) for v in torch.aminmax(index))
        if hi >= size or lo < lowest:
            raise ValueError(f"{name}: values {lo}..{hi}, expected {lowest}..{size - 1}")


# --------------------------------------------------------------------------------- rotary and KV append
def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor of x's dtype."""
    check_indices(a.positions, "positions", a.cos.shape[0])
    if not a.x.numel():
        return torch.empty_like(a.x, memory_format=torch.contiguous_format)
    return _rotate(a.x, a.cos, a.sin, a.positions, a.interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    index = positions.clamp(0, cos.shape[0] - 1)
    c, s = cos[index].float()[:, None], sin[index].float()[:, None]
    half = cos.shape[-1]
    head = x[..., : 2 * half].float()
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head[..., :half], head[..., half:]
    turned = (first * c - second * s, second * c + first * s)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., : 2 * half] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the caches; negative slots are skipped."""
    pages, page = a.k_cache.shape[:2]
    check_indices(a.slots, "slots", pages * page, lowest=-(1 << 62))
    k = a.k
    if a.cos is not None and a.sin is not None and a.positions is not None:
        check_indices(a.positions, "positions", a.cos.shape[0])
        if k.numel():
            k = _rotate(k, a.cos, a.sin, a.positions, a.interleaved)
    if not a.slots.numel() or not pages * page:
        return
    # A skipped row repeats the write of the first valid row, so that shapes never depend on values. If
    # there is none, all rows rewrite slot 0 with what it holds.
    valid = (a.slots >= 0) & (a.slots < pages * page)
    source = torch.where(valid, torch.arange(a.slots.numel(), device=a.slots.device), valid.int().argmax())
    slots = a.slots[source].clamp(0, pages * page - 1)
    where = (slots.div(page, rounding_mode="floor"), slots % page)
    for cache, new, scale in ((a.k_cache, k, a.k_scale), (a.v_cache, a.v, a.v_scale)):
        rows = new[source] if scale is None else new[source].float() / scale[:, None]
        cache[where] = torch.where(valid.any(), rows.to(cache.dtype), cache[where])


def _append_reasons(s: OpSignature) -> list[str]:
    return ["kv_layout: only nhd"] if "npu_nz" in s.dims else []


# ------------------------------------------------------------------------------------------ norm, gate
def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual), both in x's dtype; the sum is empty without a residual."""
    if a.residual is None:
        total, x = a.x.new_empty(0), a.x.float()
    else:
        total = (a.x.float() + a.residual.float()).to(a.x.dtype)
        x = total.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + a.eps)
    return (x * scale * a.weight.float()).to(a.x.dtype), total


def swiglu(a: SwigluArgs) -> Tensor:
    """``silu(gate) * up`` of x (..., 2 F)."""
    gate, up = a.x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(a.x.dtype)


# ---------------------------------------------------------------------------------------------- linear
def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` in x's dtype, through dequantized tiles of W."""
    # torch's float16 GEMM on a CPU is a thousand times slower than its float32 one.
    slow = a.x.device.type == "cpu" and a.x.dtype == torch.float16
    work = torch.float32 if slow else a.x.dtype
    return tiled_linear(a.x.to(work), a.weight).to(a.x.dtype)


def tiled_linear(x: Tensor, w: PackedWeight) -> Tensor:
    """``x @ W^T + bias`` computed in x's dtype, dequantizing at most `TILE` values of W at a time."""
    out, inn = w.shape
    step = max(1, TILE // max(inn, 1))
    pieces = [packed.slice_out(w, lo, min(lo + step, out)) for lo in range(0, out, step)]
    if len(pieces) == 1:
        return _dequantized_linear(x, w)
    result = x.new_empty((x.shape[0], out))
    for lo, piece in zip(range(0, out, step), pieces, strict=True):
        result[:, lo : lo + step] = _dequantized_linear(x, piece)
    return result


def _dequantized_linear(x: Tensor, w: PackedWeight) -> Tensor:
    bias = None if w.bias is None else w.bias.to(x.dtype)
    return F.linear(x, packed.dequantize(w, x.dtype), bias)


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W (N, in)."""
    check_indices(a.ids, "ids", a.weight.shape[0])
    return packed.rows(a.weight, a.ids, a.dtype)


# -------------------------------------------------------------------------------------------------- MX
def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (..., n): uint8 (..., ceil(n * bits / 8)) and uint8 (..., ceil(n / block))."""
    e = mx.check_pack(a.x, a.element, a.block, a.scale)
    n = a.x.shape[-1]
    blocks = mx.scale_bytes(n, a.block)
    x = F.pad(a.x.float(), (0, blocks * a.block - n)).unflatten(-1, (blocks, a.block))
    amax = (
        (x.view(torch.int32) & 0x7FFFFFFF).amax(-1) if n else x.new_empty((*x.shape[:-1],), dtype=torch.int32)
    )
    invalid = amax >= 0x7F800000

    # A subnormal amax is m * 2^-149: m's own exponent and mantissa, as a float, normalise it.
    normal = torch.where(amax < 0x800000, amax.float().view(torch.int32) - (149 << 23), amax)
    exponent = (normal >> 23) - 127 - e.emax
    exponent += (normal & 0x7FFFFF) > e.carry_above(a.scale)
    exponent = exponent.clamp(-127, 127).masked_fill_(amax == 0, -127)
    scales = (exponent + mx.SCALE_BIAS).masked_fill_(invalid, mx.SCALE_NAN).to(torch.uint8)

    scaled = _times_power(x, -exponent[..., None])
    scaled = torch.where(invalid[..., None], 0.0, scaled)
    codes = _encode(scaled, e).flatten(-2)[..., :n]
    return _pack_bits(codes, e.bits), scales


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n), computed in float32 and rounded once to ``dtype``."""
    e = mx.check_unpack(a.codes, a.scales, a.element, a.block, a.n, a.dtype)
    codes = _unpack_bits(a.codes, e.bits, a.n).long()
    values = mx.decode_table(e.name).to(a.codes.device)[codes]
    scales = a.scales.repeat_interleave(a.block, dim=-1)[..., : a.n]
    values = _times_power(values, scales.int() - mx.SCALE_BIAS)
    return torch.where(scales == mx.SCALE_NAN, torch.nan, values).to(a.dtype)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2^exponent``, |exponent| <= 128, by two normal factors: neither flushes nor overflows early."""
    half = exponent.div(2, rounding_mode="floor")
    for part in (half, exponent - half):
        x = x * ((part + 127) << 23).view(torch.float32)
    return x


def _encode(x: Tensor, e: mx.MxElement) -> Tensor:
    """Code of each scaled value, int32: nearest, ties to even, saturating."""
    if not e.exponent_bits:
        return (x * 64).round().clamp(-e.max_code, e.max_code).int() & 255
    bits = x.view(torch.int32)
    # The element's own step at |x|: 2^(exponent - mantissa_bits), no finer than that of subnormals.
    lowest = 1 - e.bias
    exponent = (((bits >> 23) & 255) - 127).clamp(lowest)
    steps = (x.abs() * ((e.mantissa_bits - exponent + 127) << 23).view(torch.float32)).round().int()
    magnitude = steps + ((exponent - lowest) << e.mantissa_bits)
    return magnitude.clamp(max=e.max_code) | ((bits < 0).int() << (e.bits - 1))


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    n = codes.shape[-1]
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 4:
        pairs = F.pad(codes, (0, n % 2)).unflatten(-1, ((n + 1) // 2, 2))
        return (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8)
    quads = F.pad(codes, (0, -n % 4)).unflatten(-1, ((n + 3) // 4, 4))
    word = quads[..., 0] | (quads[..., 1] << 6) | (quads[..., 2] << 12) | (quads[..., 3] << 18)
    out = torch.stack([(word >> shift) & 255 for shift in (0, 8, 16)], dim=-1).to(torch.uint8)
    return out.flatten(-2)[..., : (n * 6 + 7) // 8].contiguous()


def _unpack_bits(data: Tensor, bits: int, n: int) -> Tensor:
    if bits == 8:
        return data
    if bits == 4:
        return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)[..., :n]
    words = (n + 3) // 4
    triples = F.pad(data, (0, words * 3 - data.shape[-1])).unflatten(-1, (words, 3)).int()
    word = triples[..., 0] | (triples[..., 1] << 8) | (triples[..., 2] << 16)
    return torch.stack([(word >> shift) & 63 for shift in (0, 6, 12, 18)], dim=-1).flatten(-2)[..., :n]


APPEND_FEATURES = frozenset({"cos", "sin", "positions", "interleaved"})
OPS: dict[str, Op] = {
    "append_kv": Op(append_kv, APPEND_FEATURES | {"k_scale", "v_scale"}, _append_reasons),
    "rotary": Op(rotary, frozenset({"interleaved"})),
    "rms_norm": Op(rms_norm, frozenset({"residual"})),
    "swiglu": Op(swiglu),
    "linear": Op(linear, frozenset({"g_idx", "x_perm", "bias", "group_offset", "act"})),
    "embedding": Op(embedding, frozenset({"g_idx", "x_perm"})),
    "mx_pack": Op(mx_pack, frozenset({"even", "ceil"})),
    "mx_unpack": Op(mx_unpack),
}
