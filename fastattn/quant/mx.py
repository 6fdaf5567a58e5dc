"""Block formats of few bits: OCP Microscaling v1.0 (MX), and finer scales. Facts and sizes.

A block of values shares one scale. Elements are packed little-endian along the last dimension, each row
padded to whole bytes. Beside the elements of the specification there are E1M1, E2M2 and INT4 of
communication compression (arXiv 2411.09510).

How the scale of a block with largest magnitude ``amax`` is chosen (``scale=``):

``floor``  E8M0, the specification's rule: ``2^(floor(log2(amax)) - emax)``. The largest values may saturate.
``even``   the same after rounding amax to the element's precision: no whole step is lost just below a
           power of two.
``ceil``   the smallest power of two at which nothing saturates: ``ceil(log2(amax / largest element))``.
``e4m3``   ``2^k * s`` with s the E4M3 number nearest to ``2^-k * amax / largest element``;
``fp16``   the same with s a float16. k belongs to a row: ``floor(log2(amax of the row)) - emax - 7``, or
           - 14 for fp16, which puts the row's largest scale into the upper end of s's range.

E8M0 is a power of two stored as its exponent plus 127 (255: NaN); exponents and k are clamped to
[-127, 127]. The scales of a row are one byte a block; with ``e4m3`` and ``fp16`` the byte ``k + 127`` comes
first, then one or two bytes (little-endian) a block.

With ``search`` a block takes, of `CANDIDATES`, the scale of the least squared error (`ERROR_STEPS`).

A block of zeros has scale code 0, and a block that holds a NaN or an infinity has scale NaN and zero codes.
A value is multiplied by the inverse of its scale (float32; ``2^-k * (1 / s)`` where there is a k, 1 / s
rounded), rounded to the nearest element, ties to even, and saturates.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .packed import FLOATS

SCALE_BIAS = 127
SCALE_NAN = 255
BLOCK_MAX = 1024  # with `search`: sums of squared errors are exact in float32


class FineScale(NamedTuple):
    """A scale that is no power of two: a small float for the block times a power of two for the row."""

    bytes: int
    top: int  # of a row, s of the block with the largest value lies in (2^(top - 1), 2^(top + 1))
    nan: int  # its code


POWERS = ("floor", "even", "ceil")
FINE = {"e4m3": FineScale(1, 7, 0x7F), "fp16": FineScale(2, 14, 0x7E00)}
SCALES = (*POWERS, *FINE)

#: Scales that `search` tries, of equally good ones the first. E8M0: powers of two times the rule's scale;
#: finer: what stands for ``amax / largest element`` is multiplied by this before rounding.
CANDIDATES = {
    **dict.fromkeys(POWERS, (1.0, 2.0, 0.5)),
    **dict.fromkeys(FINE, (1.0, 0.9375, 0.875, 1.0625, 1.125, 1.5)),
}
#: Of two scales the better has the smaller ``scale^2 * sum(d^2)``. d is an element's error in units of
#: 1 / ERROR_STEPS of the largest distance between neighbouring elements, rounded to an integer of at most
#: ERROR_MAX, so that the sum is exact in any order.
ERROR_STEPS = 32
ERROR_MAX = 127


class MxElement(NamedTuple):
    """One element format. Integers are two's complement in steps of 2^-mantissa_bits, used symmetrically."""

    name: str
    bits: int
    exponent_bits: int  # 0: an integer
    mantissa_bits: int
    bias: int
    emax: int  # exponent of the largest value
    max_code: int  # magnitude bits of the largest value

    @property
    def max_value(self) -> float:
        if not self.exponent_bits:
            return self.max_code / (1 << self.mantissa_bits)
        fraction = self.max_code & ((1 << self.mantissa_bits) - 1)
        return float(2**self.emax * (1 + fraction / (1 << self.mantissa_bits)))

    @property
    def error_unit(self) -> float:
        """See `ERROR_STEPS`."""
        return 2.0 ** (self.emax - self.mantissa_bits) / ERROR_STEPS

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
        MxElement("e1m1", 3, 1, 1, 0, 1, 0b0_11),
        MxElement("e2m1", 4, 2, 1, 1, 2, 0b0_111),
        MxElement("e2m2", 5, 2, 2, 1, 2, 0b0_1111),
        MxElement("e2m3", 6, 2, 3, 1, 2, 0b0_11111),
        MxElement("e3m2", 6, 3, 2, 3, 4, 0b0_11111),
        MxElement("e4m3", 8, 4, 3, 7, 8, 0b0_1111_110),  # 0x7f is NaN
        MxElement("e5m2", 8, 5, 2, 15, 15, 0b0_11110_11),  # 0x7c is infinity, above it NaN
        MxElement("int4", 4, 0, 2, 0, 0, 7),
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


def scale_bytes(n: int, block: int, scale: str = "floor") -> int:
    """Bytes of the scales of a row of ``n`` values."""
    if block < 1:
        raise ValueError(f"block: {block}, expected at least 1")
    blocks = -(-n // block)
    return 1 + FINE[scale].bytes * blocks if check_scale(scale) in FINE else blocks


def check_scale(scale: str) -> str:
    """``scale``; ValueError when there is none of this name."""
    if scale not in SCALES:
        raise ValueError(f"scale: {scale!r}, expected one of {', '.join(SCALES)}")
    return scale


def check_format(name: str, block: int, scale: str, search: bool = False) -> MxElement:
    """Raises ValueError unless there is such a format; returns the element format."""
    if block < 1 or (search and block > BLOCK_MAX):
        raise ValueError(f"block: {block}, expected {f'1 to {BLOCK_MAX}' if search else 'at least 1'}")
    check_scale(scale)
    return element(name)


def check_pack(x: Tensor, name: str, block: int, scale: str, search: bool = False) -> MxElement:
    """Raises ValueError unless ``x`` can be packed so; returns the element format."""
    if x.dtype not in FLOATS:
        raise ValueError(f"x: {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    if x.ndim < 1:
        raise ValueError("x: a scalar, expected at least one dimension")
    return check_format(name, block, scale, search)


def check_unpack(
    codes: Tensor, scales: Tensor, name: str, block: int, n: int, dtype: torch.dtype, scale: str
) -> MxElement:
    """Raises ValueError unless these are the codes and scales of rows of ``n`` values."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype: {dtype}, expected one of {', '.join(map(str, FLOATS))}")
    e = check_format(name, block, scale)
    sizes = ("codes", codes, code_bytes(n, name)), ("scales", scales, scale_bytes(n, block, scale))
    for what, t, last in sizes:
        expected = (*codes.shape[:-1], last)
        if t.dtype != torch.uint8 or tuple(t.shape) != expected:
            raise ValueError(f"{what}: {t.dtype} {tuple(t.shape)}, expected torch.uint8 {expected}")
    return e


@cache
def decode_table(name: str) -> Tensor:
    """Value of every code, float32 (2^bits,) on the CPU."""
    e = element(name)
    half = 1 << (e.bits - 1)
    codes = torch.arange(2 * half, dtype=torch.int32)
    if not e.exponent_bits:
        return torch.where(codes < half, codes, codes - 2 * half) / (1 << e.mantissa_bits)
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
