"""Tiles of the linear kernels for packed weights, for each class of GPU. `tiles` has those of attention.

No entry was measured: those for few rows of x are as high as the rows and keep four steps of W in flight,
those for many are the largest that ptxas compiles without spills (tests/triton/test_compile_ops.py). What
`fastattn tune` measured on the GPU at hand wins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from ..spec import PackedWeight
from .device import Chip
from .tiles import chip_class


class LinearTile(NamedTuple):
    """The shape of a program and the compiler options that go with it."""

    block_m: int  # rows of x
    block_n: int  # rows of W
    block_k: int  # columns of a step, cut to what a group of W allows
    num_warps: int
    num_stages: int  # steps in flight


class LinearNeed(NamedTuple):
    """What tiles depend on."""

    rows: int  # of x: 16, 32 or 64 at most, for the kernel for few; MANY for the other
    bits: int  # of W's codes, 4 or 8


#: Rows whose strides, addresses and lengths Triton knows to be multiples of this are loaded 16 bytes at a
#: time, and ahead.
_ALIGNED = 16

#: `LinearNeed.rows` of the kernel for many rows.
MANY = 256

_FEW = {
    16: LinearTile(16, 64, 128, 4, 4),
    32: LinearTile(32, 64, 128, 4, 4),
    64: LinearTile(64, 128, 64, 8, 4),
}
#: By class (`tiles.chip_class`) and `LinearNeed.rows`. Turing has no entry for many rows: no tensor cores.
LINEAR_TILES: dict[int, dict[int, LinearTile]] = {
    75: _FEW,
    80: _FEW | {MANY: LinearTile(128, 128, 64, 8, 3)},
    86: _FEW | {MANY: LinearTile(128, 128, 64, 8, 3)},
    90: _FEW | {MANY: LinearTile(256, 128, 128, 8, 3)},
}


def linear_tile(chip: Chip, need: LinearNeed) -> LinearTile | None:
    """The table's tile; None where it has none."""
    return LINEAR_TILES[chip_class(chip.capability)].get(need.rows)


def fit(t: LinearTile, x: Tensor, w: PackedWeight) -> LinearTile:
    """The tile with steps that stay within a group of W, where groups are that wide.

    Of rows that begin or end anywhere each value is a load of its own, into registers, where less has room.
    """
    begins = [n for rows in (x, w.tensors["codes"]) for n in (rows.stride(0), rows.data_ptr())]
    if any(n % _ALIGNED for n in (w.shape[1], *begins)):
        t = t._replace(block_m=min(t.block_m, 128), block_k=32, num_stages=2)
    if w.g_idx is not None or has_one_group(w):
        return t
    shared = math.gcd(group_period(w), t.block_k)
    return t._replace(block_k=shared) if shared >= 32 else t


def one_group_a_step(t: LinearTile, w: PackedWeight) -> bool:
    """Whether all columns of any step of a fitted tile are of one group."""
    return w.g_idx is None and (has_one_group(w) or group_period(w) % t.block_k == 0)


def has_one_group(w: PackedWeight) -> bool:
    """Whether all columns of W are of its first group: every ``(column + group_offset) // group_size`` is 0.

    Steps may then be of any width: what the last one has beyond W's columns is loaded as 0.
    """
    return w.group_offset + w.shape[1] <= w.group_size


def group_period(w: PackedWeight) -> int:
    """No group begins between two neighbouring multiples of this column."""
    return math.gcd(w.group_size, w.group_offset)


def bits(w: PackedWeight) -> int:
    """Of a packed weight's codes."""
    return 4 if w.format == "int4" else 8
