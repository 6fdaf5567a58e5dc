"""Packing to and from formats of few bits (quant/mx.py), a row a program."""

from __future__ import annotations

import triton
import triton.language as tl

from .mx_element import (
    decode,
    encode,
    exponent_and_mantissa,
    float_bits,
    round_scale,
    scale_value,
    times_power,
)


# ------------------------------------------------------------------------------------------ in registers
@triton.jit
def _rotated(x, LENGTH: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr, FACTOR: tl.constexpr):
    """The first WHOLE of WIDTH values, in blocks of LENGTH, times the orthonormal Hadamard matrix."""
    y = x
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
def encode_kernel(
    x, kept, codes, scales, x_stride, n, code_bytes, scale_bytes,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BITS: tl.constexpr,
    ROTATE: tl.constexpr, WHOLE: tl.constexpr, FACTOR: tl.constexpr,
    EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, MAX_CODE: tl.constexpr,
    MAX_VALUE: tl.constexpr, EMAX: tl.constexpr, CARRY: tl.constexpr, SCALE: tl.constexpr, FINE: tl.constexpr,
    SCALE_BYTES: tl.constexpr, TOP: tl.constexpr, NAN_CODE: tl.constexpr, CANDIDATES: tl.constexpr,
    TRIED: tl.constexpr, ERROR_UNIT: tl.constexpr, ERROR_MAX: tl.constexpr,
):  # fmt: skip
    """Codes and scales of one row a program; ``kept``, the row's columns that are quantized, or None: all."""
    WIDTH: tl.constexpr = BLOCK * BLOCKS
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    column = tl.load(kept + place, place < n, 0) if kept is not None else place
    values = tl.load(x + row * x_stride + column, place < n, 0.0).to(tl.float32)
    if ROTATE > 0:
        values = _rotated(values, ROTATE, WIDTH, WHOLE, FACTOR)
    found, scale, k = _quantized(
        tl.reshape(values, (BLOCKS, BLOCK)), EXPONENT_BITS, MANTISSA_BITS, BIAS, BITS, MAX_CODE, MAX_VALUE,
        EMAX, CARRY, SCALE, FINE, TOP, NAN_CODE, CANDIDATES, TRIED, ERROR_UNIT, ERROR_MAX,
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
        tl.store(
            scales + row * scale_bytes + byte, ((scale >> (8 * i)) & 255).to(tl.uint8), byte < scale_bytes
        )
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
def decode_sum_kernel(
    messages, kept, out, n, hidden, code_bytes, scale_bytes, scales_at,
    WORLD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    ROTATE: tl.constexpr, WHOLE: tl.constexpr, FACTOR: tl.constexpr, EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, FINE: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
):  # fmt: skip
    """One row of the sum a program; ``scales_at`` is where scales begin in a message."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
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
    column = tl.load(kept + place, place < n, 0) if kept is not None else place
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), place < n)
