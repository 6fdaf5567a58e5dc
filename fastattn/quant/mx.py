"""The MX formats of the OCP Microscaling specification v1.0: facts and sizes.

A block of values shares one E8M0 scale, a power of two stored as its exponent plus 127 (255: NaN).
Elements are packed little-endian along the last dimension, each row padded to whole bytes.

How the scale of a block with largest magnitude ``amax`` is chosen (``scale=``):

``floor``  the specification's rule: ``floor(log2(amax)) - emax``. The largest values may saturate.
``even``   the same after rounding amax to the element's precision: no whole step is lost just below a
           power of two.
``ceil``   the smallest power of two at which nothing saturates: ``ceil(log2(amax / largest element))``.

The exponent is clamped to [-127, 127]. A block of zeros has scale code 0, and a block that holds a NaN or
an infinity has scale NaN and zero codes. Elements are rounded to nearest, ties to even, and saturate.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_BIAS = 127
SCALE_NAN = 255
SCALES = ("floor", "even", "ceil")


class MxElement(NamedTuple):
    """One element format. INT8 is two's complement in steps of 1/64, used symmetrically (-127..127)."""

    name: str
    bits: int
    exponent_bits: int  # 0: INT8
    mantissa_bits: int
    bias: int
    emax: int  # exponent of the largest value
    max_code: int  # magnitude bits of the largest value

    @property
    def max_value(self) -> float:
        if not self.exponent_bits:
            return self.max_code / 64
        fraction = self.max_code & ((1 << self.mantissa_bits) - 1)
        return float(2**self.emax * (1 + fraction / (1 << self.mantissa_bits)))

    def carry_above(self, scale: str) -> int:
        """The rule ``scale`` adds 1 to the exponent when amax's 23 mantissa bits exceed this number."""
        if scale == "floor":
            return (1 << 23) - 1
        if scale == "even":
            return (1 << 23) - (1 << (22 - self.mantissa_bits)) - 1
        return (self.max_code << (23 - self.mantissa_bits)) & ((1 << 23) - 1)


ELEMENTS = {
    e.name: e
    for e in (
        MxElement("e2m1", 4, 2, 1, 1, 2, 0b0_111),
        MxElement("e2m3", 6, 2, 3, 1, 2, 0b0_11111),
        MxElement("e3m2", 6, 3, 2, 3, 4, 0b0_11111),
        MxElement("e4m3", 8, 4, 3, 7, 8, 0b0_1111_110),  # 0x7f is NaN
        MxElement("e5m2", 8, 5, 2, 15, 15, 0b0_11110_11),  # 0x7c is infinity, above it NaN
        MxElement("int8", 8, 0, 6, 0, 0, 127),
    )
}


def element(name: str) -> MxElement:
    """The format called ``name``; ValueError when there is none."""
    if name not in ELEMENTS:
        raise ValueError(f"element: {name!r}, expected one of {', '.join(ELEMENTS)}")
    return ELEMENTS[name]


def code_bytes(n: int, name: str) -> int:
    """Bytes of a row of ``n`` codes."""
    return (n * element(name).bits + 7) // 8


def scale_bytes(n: int, block: int) -> int:
    """Bytes of the scales of a row of ``n`` values."""
    if block < 1:
        raise ValueError(f"block: {block}, expected at least 1")
    return -(-n // block)


def check_pack(x: Tensor, name: str, block: int, scale: str) -> MxElement:
    """Raises ValueError unless ``x`` can be packed so; returns the element format."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"x: {x.dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    if x.ndim < 1:
        raise ValueError("x: a scalar, expected at least one dimension")
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r}, expected one of {', '.join(SCALES)}")
    scale_bytes(x.shape[-1], block)
    return element(name)


def check_unpack(
    codes: Tensor, scales: Tensor, name: str, block: int, n: int, dtype: torch.dtype
) -> MxElement:
    """Raises ValueError unless these are the codes and scales of rows of ``n`` values."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: {dtype}, expected torch.float32, torch.float16 or torch.bfloat16")
    for what, t, last in (("codes", codes, code_bytes(n, name)), ("scales", scales, scale_bytes(n, block))):
        expected = (*codes.shape[:-1], last)
        if t.dtype != torch.uint8 or tuple(t.shape) != expected:
            raise ValueError(f"{what}: {t.dtype} {tuple(t.shape)}, expected torch.uint8 {expected}")
    return element(name)


@cache
def decode_table(name: str) -> Tensor:
    """Value of every code, float32 (2^bits,) on the CPU."""
    e = element(name)
    codes = torch.arange(1 << e.bits, dtype=torch.int32)
    if not e.exponent_bits:
        return codes.to(torch.uint8).view(torch.int8).to(torch.float32) / 64
    half = 1 << (e.bits - 1)
    magnitude = codes % half
    exponent, fraction = magnitude >> e.mantissa_bits, magnitude & ((1 << e.mantissa_bits) - 1)
    significand = torch.where(exponent > 0, fraction + (1 << e.mantissa_bits), fraction).to(torch.float32)
    value = torch.ldexp(significand, exponent.clamp(min=1) - e.bias - e.mantissa_bits)
    if name == "e5m2":
        value[magnitude == 0x7C] = torch.inf
        value[magnitude > 0x7C] = torch.nan
    elif name == "e4m3":
        value[magnitude == 0x7F] = torch.nan
    return torch.where(codes >= half, -value, value)
