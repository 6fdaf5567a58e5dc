"""The layout of one message of compressed communication: a quantized (rows, hidden) tensor in bytes.

    codes of every row | scales of every row | outlier channels of every row

Codes and scales are those of `mx` for rows of the channels that are no outliers, in their order. Outliers
are bfloat16, little-endian: exact for bfloat16 inputs, and of the full range for all, where float16 would
overflow on the very channels that are kept because they are large. Nothing is padded or aligned.

With a rotation, each whole block of so many quantized channels is multiplied by the Hadamard matrix in
Sylvester's order over the square root of its length, which is its own inverse; channels after the last whole
block are not. In float32: butterflies (a + b, a - b) of channels 1 apart, then 2, 4 ..., then one factor.
"""

from __future__ import annotations

from typing import NamedTuple

from . import mx

ROTATIONS = (0, 32, 64, 128)


class Layout(NamedTuple):
    """Sizes of a message's parts."""

    rows: int
    kept: int  # channels that are quantized
    code_bytes: int  # of a row
    scale_bytes: int
    outlier_bytes: int

    @classmethod
    def of(
        cls, rows: int, hidden: int, element: str, block: int, scale: str, outliers: tuple[int, ...]
    ) -> Layout:
        """Raises ValueError naming what is out of range."""
        if rows < 0:
            raise ValueError(f"rows: {rows}, expected at least 0")
        if outliers and outliers[-1] >= hidden:
            raise ValueError(f"outliers: channel {outliers[-1]}, expected below hidden {hidden}")
        kept = hidden - len(outliers)
        sizes = mx.code_bytes(kept, element), mx.scale_bytes(kept, block, scale)
        return cls(rows, kept, *sizes, 2 * len(outliers))

    @property
    def nbytes(self) -> int:
        return self.rows * (self.code_bytes + self.scale_bytes + self.outlier_bytes)

    @property
    def spans(self) -> tuple[slice, slice, slice]:
        """Where codes, scales and outliers are."""
        scales = self.rows * self.code_bytes
        outliers = scales + self.rows * self.scale_bytes
        return slice(0, scales), slice(scales, outliers), slice(outliers, self.nbytes)


def check(rotate: int, outliers: tuple[int, ...]) -> None:
    """Raises ValueError unless ``rotate`` and ``outliers`` are of `spec.EncodeArgs`'s kind."""
    if rotate not in ROTATIONS:
        raise ValueError(f"rotate: {rotate}, expected one of {', '.join(map(str, ROTATIONS))}")
    previous = -1
    for channel in outliers:
        if channel <= previous:
            raise ValueError(f"outliers: {outliers}, expected channels from 0 in ascending order")
        previous = channel
