"""Elements and scales of the formats of few bits (quant/mx.py), on values in registers.

Bit for bit what the oracle gives: every step is exact or one rounding of float32. Kernels that call these
are compiled without contraction into fused multiply-adds (`Launch.fuse`), which would round once where the
definition rounds twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer
_NAN: tl.constexpr = tl.constexpr(float("nan"))
_INF: tl.constexpr = tl.constexpr(float("inf"))


@triton.jit
def float_bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def power(exponent):
    """2^exponent, -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def times_power(x, exponent):
    """``x * 2^exponent``, |exponent| <= 128, by two normal factors: neither flushes nor overflows early."""
    half = exponent >> 1
    return x * power(half) * power(exponent - half)


@triton.jit
def exponent_and_mantissa(bits):
    """floor(log2) and 23 mantissa bits of positive floats given as bits."""
    # A subnormal is m * 2^-149: m's own exponent and mantissa, as a float, normalise it.
    normal = tl.where(bits < 0x800000, float_bits(bits.to(tl.float32)) - (149 << 23), bits)
    return (normal >> 23) - 127, normal & 0x7FFFFF


@triton.jit
def encode(
    x, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr,
    MAX_CODE: tl.constexpr, MAX_VALUE: tl.constexpr,
):  # fmt: skip
    """Code (int32) and magnitude of the element nearest to each scaled value: ties to even, saturating."""
    bits = float_bits(x)
    magnitude = tl.abs(x)
    if EXPONENT_BITS > 0:
        # The element's own step at |x|: 2^(exponent - mantissa_bits), no finer than that of subnormals.
        lowest: tl.constexpr = 1 - BIAS
        exponent = tl.maximum(((bits >> 23) & 255) - 127, lowest)
        steps = magnitude * power(MANTISSA_BITS - exponent) + _ROUND - _ROUND
        code = tl.minimum(steps.to(tl.int32) + ((exponent - lowest) << MANTISSA_BITS), MAX_CODE)
        rounded = tl.minimum(steps * power(exponent - MANTISSA_BITS), MAX_VALUE)
        code = code | tl.where(bits < 0, 1 << (BITS - 1), 0)
    else:
        unit: tl.constexpr = 1 << MANTISSA_BITS
        steps = tl.minimum(magnitude * unit, MAX_CODE * 1.0) + _ROUND - _ROUND
        rounded = steps * (1.0 / unit)
        signed = tl.where(bits < 0, -steps, steps).to(tl.int32)
        code = signed & ((1 << BITS) - 1)
    return code, rounded


@triton.jit
def decode(
    code, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr, BIAS: tl.constexpr, BITS: tl.constexpr
):
    """Value of each code (int32), float32."""
    half: tl.constexpr = 1 << (BITS - 1)
    if EXPONENT_BITS == 0:
        return tl.where(code < half, code, code - 2 * half).to(tl.float32) * (1.0 / (1 << MANTISSA_BITS))
    magnitude = code & (half - 1)
    exponent = magnitude >> MANTISSA_BITS
    fraction = magnitude & ((1 << MANTISSA_BITS) - 1)
    significand = tl.where(exponent > 0, fraction + (1 << MANTISSA_BITS), fraction).to(tl.float32)
    value = significand * power(tl.maximum(exponent, 1) - BIAS - MANTISSA_BITS)
    if EXPONENT_BITS == 5:  # E5M2 has infinities and NaN, E4M3 one NaN
        value = tl.where(magnitude == 0x7C, _INF, tl.where(magnitude > 0x7C, _NAN, value))
    if EXPONENT_BITS == 4:
        value = tl.where(magnitude == 0x7F, _NAN, value)
    return tl.where(code >= half, -value, value)


@triton.jit
def round_scale(s, SCALE: tl.constexpr):
    """Code (int32) of the fine scale nearest to s >= 0."""
    if SCALE == "e4m3":
        code, _ = encode(s, 4, 3, 7, 8, 0x7E, 448.0)
        return code
    return s.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def scale_value(code, SCALE: tl.constexpr):
    if SCALE == "e4m3":
        return decode(code, 4, 3, 7, 8)
    return code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
