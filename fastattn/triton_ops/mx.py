"""Packing to and from formats of few bits, and the messages of compressed communication.

One program encodes a row: it is read once, rotated, scaled, rounded and packed in registers. One program
decodes a row of every message, adds them in their order and writes the sum once. What the formats are:
quant/mx.py; what a message is: quant/message.py.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant import message, mx
from ..spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, OpSignature
from .mx_element import (
    EXACT,
    decode,
    encode,
    exponent_and_mantissa,
    float_bits,
    round_scale,
    scale_value,
    times_power,
)

BLOCKS = (8, 16, 32, 64, 128)
WIDEST = 1 << 14  # values of a row that fit the registers of one program


# ------------------------------------------------------------------------------------------ in registers
@triton.jit
def _rotated(x, LENGTH: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, FACTOR: tl.constexpr):
    """The first WHOLE of WIDTH values, in blocks of LENGTH, times the orthonormal Hadamard matrix."""
    y = x
    step: tl.constexpr = 1
    for stage in tl.static_range(7):
        if (1 << stage) < LENGTH:
            pairs = tl.reshape(y, (WIDTH >> (stage + 1), 2, 1 << stage))
            first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
            y = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (WIDTH,))
    return tl.where(tl.arange(0, WIDTH) < WHOLE, y * FACTOR, x)


@triton.jit
def _cost(rounded, scaled, value, UNIT: tl.constexpr, LARGEST: tl.constexpr):
    """The squared error of each block, exact in units of UNIT, times the square of its scale."""
    error = tl.minimum(tl.abs(rounded - tl.abs(scaled)) * (1.0 / UNIT), LARGEST)
    error = error + 12582912.0 - 12582912.0
    return tl.sum(error * error, 1) * (value * value)


@triton.jit
def _quantized(
    x, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr,
    MAX_CODE: tl.constexpr, MAX_VALUE: tl.constexpr, EMAX: tl.constexpr, CARRY: tl.constexpr,
    SCALE: tl.constexpr, FINE: tl.constexpr, TOP: tl.constexpr, NAN_CODE: tl.constexpr,
    CANDIDATES: tl.constexpr, TRIED: tl.constexpr, ERROR_UNIT: tl.constexpr, ERROR_MAX: tl.constexpr,
):  # fmt: skip
    """Codes of x (blocks, block), scale codes (blocks,) and the row's k; E8M0 scales come with k = 0.

    CANDIDATES are what `mx.CANDIDATES` lists: exponents to add for E8M0, factors over the largest element for
    finer scales. The first of the cheapest is taken.
    """
    amax = tl.max(float_bits(x) & 0x7FFFFFFF, 1)
    valid = amax < 0x7F800000
    x = tl.where(valid[:, None], x, 0.0)
    amax = tl.where(valid, amax, 0)
    if FINE:
        row = tl.max(amax, 0)
        exponent, _ = exponent_and_mantissa(row)
        k = tl.where(row == 0, -127, tl.minimum(tl.maximum(exponent - EMAX - TOP, -127), 127))
        largest = times_power(amax.to(tl.float32, bitcast=True), -k)
        inside = times_power(x, -k)
    else:
        exponent, mantissa = exponent_and_mantissa(amax)
        exponent = exponent - EMAX + tl.where(mantissa > CARRY, 1, 0)
        exponent = tl.where(amax == 0, -127, tl.minimum(tl.maximum(exponent, -127), 127))
        k = 0
    for i in tl.static_range(TRIED):
        if FINE:
            tried = round_scale(largest * CANDIDATES[i], SCALE)
            value = scale_value(tried, SCALE)
            one = tl.full(value.shape, 1.0, tl.float32)
            inverse = tl.where(value == 0, 0.0, tl.div_rn(one, tl.where(value == 0, one, value)))
            scaled = inside * inverse[:, None]
        else:
            tried = tl.minimum(tl.maximum(exponent + CANDIDATES[i], -127), 127)
            scaled = times_power(x, -tried[:, None])
            value = times_power(tl.full(tried.shape, 1.0, tl.float32), tried - exponent)
        codes, rounded = encode(scaled, EXPONENT_BITS, MANTISSA_BITS, BIAS, BITS, MAX_CODE, MAX_VALUE)
        if TRIED > 1:
            cost = _cost(rounded, scaled, value, ERROR_UNIT, ERROR_MAX)
            if i == 0:
                best, best_codes, best_cost = tried, codes, cost
            else:
                lower = cost < best_cost
                best = tl.where(lower, tried, best)
                best_codes = tl.where(lower[:, None], codes, best_codes)
                best_cost = tl.where(lower, cost, best_cost)
        else:
            best, best_codes = tried, codes
    if not FINE:
        best += 127
    return best_codes, tl.where(valid, best, NAN_CODE), k


# ------------------------------------------------------------------------------------------------ kernels
@triton.jit
def _encode(
    x, kept, codes, scales, x_stride, n, code_bytes, scale_bytes,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr,
    ROTATE: tl.constexpr, WHOLE: tl.constexpr, FACTOR: tl.constexpr,
    EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, MAX_CODE: tl.constexpr,
    MAX_VALUE: tl.constexpr, EMAX: tl.constexpr, CARRY: tl.constexpr, SCALE: tl.constexpr, FINE: tl.constexpr,
    SCALE_BYTES: tl.constexpr, TOP: tl.constexpr, NAN_CODE: tl.constexpr, CANDIDATES: tl.constexpr,
    TRIED: tl.constexpr, ERROR_UNIT: tl.constexpr, ERROR_MAX: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK * BLOCKS
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    column = tl.load(kept + place, place < n, 0) if GATHER else place
    values = tl.load(x + row * x_stride + column, place < n, 0.0).to(tl.float32)
    if ROTATE > 0:
        values = _rotated(values, ROTATE, WIDTH, WHOLE, FACTOR)
    found, scale, k = _quantized(
        tl.reshape(values, (BLOCKS, BLOCK)), EXPONENT_BITS, MANTISSA_BITS, BIAS, BITS, MAX_CODE, MAX_VALUE, EMAX,
        CARRY, SCALE, FINE, TOP, NAN_CODE, CANDIDATES, TRIED, ERROR_UNIT, ERROR_MAX,
    )  # fmt: skip
    # What lies past the row is zero, so the bits that fill its last byte are.
    found = tl.where(tl.reshape(place, (BLOCKS, BLOCK)) < n, found, 0)
    eights = tl.reshape(found, (WIDTH // 8, 8)).to(tl.int64) << (tl.arange(0, 8) * BITS)[None, :]
    word = tl.sum(eights, 1)
    for i in tl.static_range(BITS):
        byte = tl.arange(0, WIDTH // 8) * BITS + i
        tl.store(codes + row * code_bytes + byte, ((word >> (8 * i)) & 255).to(tl.uint8), byte < code_bytes)
    block = tl.arange(0, BLOCKS)
    first = 1 if FINE else 0
    for i in tl.static_range(SCALE_BYTES):
        byte = first + block * SCALE_BYTES + i
        tl.store(scales + row * scale_bytes + byte, ((scale >> (8 * i)) & 255).to(tl.uint8), byte < scale_bytes)
    if FINE:
        tl.store(scales + row * scale_bytes, (k + 127).to(tl.uint8))


@triton.jit
def _decoded(
    codes, scales, place, n, code_bytes, BLOCK: tl.constexpr, BITS: tl.constexpr, EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, FINE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    """Values of a row at ``place``, float32; ``codes`` and ``scales`` point at the row."""
    bit = place * BITS
    byte = bit >> 3
    word = tl.load(codes + byte, (place < n) & (byte < code_bytes), 0).to(tl.int32)
    if 8 % BITS != 0:
        word |= tl.load(codes + byte + 1, (place < n) & (byte + 1 < code_bytes), 0).to(tl.int32) << 8
    code = (word >> (bit & 7)) & ((1 << BITS) - 1)
    value = decode(code, EXPONENT_BITS, MANTISSA_BITS, BIAS, BITS)
    block = place // BLOCK
    if FINE:
        k = tl.load(scales).to(tl.int32)
        scale = tl.load(scales + 1 + block * SCALE_BYTES, place < n, 0).to(tl.int32)
        if SCALE_BYTES == 2:
            scale |= tl.load(scales + 2 + block * SCALE_BYTES, place < n, 0).to(tl.int32) << 8
        # The product of an element and a scale is exact.
        value *= scale_value(scale, SCALE)
    else:
        k = tl.load(scales + block, place < n, 0).to(tl.int32)
    return tl.where(k == 255, float("nan"), times_power(value, k - 127))


@triton.jit
def _decode_sum(
    messages, kept, out, n, hidden, code_bytes, scale_bytes, scales_at,
    WORLD: tl.constexpr, GATHER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    ROTATE: tl.constexpr, WHOLE: tl.constexpr, FACTOR: tl.constexpr, EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, FINE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of the sum; ``scales_at`` is where scales begin in a message of codes | scales."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    for i in tl.static_range(WORLD):
        codes = messages[i] + row * code_bytes
        scales = messages[i] + scales_at + row * scale_bytes
        value = _decoded(
            codes, scales, place, n, code_bytes, BLOCK, BITS, EXPONENT_BITS, MANTISSA_BITS, BIAS, SCALE, FINE,
            SCALE_BYTES,
        )  # fmt: skip
        total = value if i == 0 else total + value
    if ROTATE > 0:
        total = _rotated(total, ROTATE, WIDTH, WHOLE, FACTOR)
    column = tl.load(kept + place, place < n, 0) if GATHER else place
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), place < n)


# ---------------------------------------------------------------------------------------------------- ops
def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (..., n), both uint8."""
    mx.check_pack(a.x, a.element, a.block, a.scale, a.search)
    n = a.x.shape[-1]
    x = a.x.reshape(-1, n)
    sizes = mx.code_bytes(n, a.element), mx.scale_bytes(n, a.block, a.scale)
    codes, scales = (a.x.new_empty((*a.x.shape[:-1], size), dtype=torch.uint8) for size in sizes)
    _launch_encode(x, None, codes, scales, n, *sizes, a.element, a.block, a.scale, a.search, 0)
    return codes, scales


def encode_message(a: EncodeArgs) -> Tensor:
    """The message of x (rows, hidden), uint8 (Layout.nbytes,)."""
    rows, hidden = a.x.shape
    layout = message.Layout.of(rows, hidden, a.element, a.block, a.scale, a.outliers)
    kept, outliers = _channels(hidden, a.outliers, a.x.device)
    out = a.x.new_empty(layout.nbytes, dtype=torch.uint8)
    codes, scales, values = (out[span] for span in layout.spans)
    _launch_encode(
        a.x, kept if a.outliers else None, codes, scales, layout.kept, layout.code_bytes, layout.scale_bytes,
        a.element, a.block, a.scale, a.search, a.rotate,
    )  # fmt: skip
    if a.outliers:
        values.copy_(a.x[:, outliers].bfloat16().view(torch.uint8).flatten())
    return out


def _launch_encode(
    x: Tensor, kept: Tensor | None, codes: Tensor, scales: Tensor, n: int, code_bytes: int, scale_bytes: int,
    element: str, block: int, scale: str, search: bool, rotate: int,
) -> None:  # fmt: skip
    rows = x.shape[0]
    if not rows or not scale_bytes:
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    e = mx.element(element)
    fine = mx.FINE.get(scale)
    tried = mx.CANDIDATES[scale] if search else (1.0,)
    powers = {1.0: 0, 2.0: 1, 0.5: -1}
    blocks = triton.next_power_of_2(-(-n // block)) if n else 1
    _encode[(rows,)](
        x, x if kept is None else kept, codes, scales, x.stride(0), n, code_bytes, scale_bytes,
        GATHER=kept is not None, BLOCK=block, BLOCKS=blocks, **_element(element), **_rotation(rotate, n),
        MAX_CODE=e.max_code, MAX_VALUE=e.max_value, EMAX=e.emax, CARRY=e.carry_above(scale),
        SCALE=scale, FINE=fine is not None, SCALE_BYTES=fine.bytes if fine else 1, TOP=fine.top if fine else 0,
        NAN_CODE=fine.nan if fine else mx.SCALE_NAN,
        CANDIDATES=tuple(f / e.max_value for f in tried) if fine else tuple(powers[f] for f in tried),
        TRIED=len(tried), ERROR_UNIT=e.error_unit, ERROR_MAX=float(mx.ERROR_MAX),
        num_warps=_warps(blocks * block), **EXACT,
    )  # fmt: skip


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n), computed in float32 and rounded once to ``dtype``."""
    mx.check_unpack(a.codes, a.scales, a.element, a.block, a.n, a.dtype, a.scale)
    lead = a.codes.shape[:-1]
    joined = torch.cat((a.codes.flatten(), a.scales.flatten()))
    out = a.codes.new_empty((*lead, a.n), dtype=a.dtype)
    rows = lead.numel()
    _launch_decode((joined,), None, out, rows, a.n, a.n, a.codes.shape[-1], a.scales.shape[-1], a, 0)
    return out


def decode_sum(a: DecodeSumArgs) -> Tensor:
    """The sum of the messages (rows, hidden): float32, in their order, rounded once to ``dtype``."""
    layout = message.Layout.of(a.rows, a.hidden, a.element, a.block, a.scale, a.outliers)
    device = a.messages[0].device
    kept, outliers = _channels(a.hidden, a.outliers, device)
    out = a.out if a.out is not None else torch.empty((a.rows, a.hidden), dtype=a.dtype, device=device)
    _launch_decode(
        a.messages, kept if a.outliers else None, out, a.rows, layout.kept, a.hidden, layout.code_bytes,
        layout.scale_bytes, a, a.rotate,
    )  # fmt: skip
    if a.outliers and a.rows:
        total: Tensor | None = None
        for m in a.messages:
            # A copy: bfloat16 must begin at an even byte.
            part = m[layout.spans[2]].clone().view(torch.bfloat16).view(a.rows, -1).float()
            total = part if total is None else total + part
        assert total is not None
        out[:, outliers] = total.to(a.dtype)
    return out


def _launch_decode(
    messages: tuple[Tensor, ...], kept: Tensor | None, out: Tensor, rows: int, n: int, hidden: int,
    code_bytes: int, scale_bytes: int, a: MxUnpackArgs | DecodeSumArgs, rotate: int,
) -> None:  # fmt: skip
    if not rows or not n:
        return
    fine = mx.FINE.get(a.scale)
    width = max(triton.next_power_of_2(n), rotate)
    _decode_sum[(rows,)](
        messages, messages[0] if kept is None else kept, out, n, hidden, code_bytes, scale_bytes,
        rows * code_bytes, WORLD=len(messages), GATHER=kept is not None, WIDTH=width, BLOCK=a.block,
        **_element(a.element), **_rotation(rotate, n), SCALE=a.scale, FINE=fine is not None,
        SCALE_BYTES=fine.bytes if fine else 1, num_warps=_warps(width), **EXACT,
    )  # fmt: skip


def _element(name: str) -> dict[str, int]:
    e = mx.element(name)
    sizes = {"EXPONENT_BITS": e.exponent_bits, "MANTISSA_BITS": e.mantissa_bits}
    return {**sizes, "BIAS": e.bias, "BITS": e.bits}


def _rotation(length: int, n: int) -> dict[str, int | float]:
    whole = n // length * length if length else 0
    factor = float(torch.tensor(length**-0.5, dtype=torch.float32)) if length else 1.0
    return {"ROTATE": length if whole else 0, "WHOLE": whole, "FACTOR": factor}


@lru_cache(maxsize=256)
def _channels(hidden: int, outliers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the channels that are quantized, and of the outliers."""
    quantized = torch.ones(hidden, dtype=torch.bool)
    index = torch.tensor(outliers, dtype=torch.int64)
    quantized[index] = False
    return quantized.nonzero().flatten().to(device), index.to(device)


def _warps(values: int) -> int:
    return min(max(values // 512, 1), 16)


def reasons(s: OpSignature) -> list[str]:
    """Of all four ops: block lengths whose codes fill whole bytes, in powers of two."""
    block = s.dims[1]
    return [] if block in BLOCKS else [f"block {block}, it takes {', '.join(map(str, BLOCKS))}"]
