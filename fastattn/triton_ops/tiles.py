"""Tiles: how much of its work a program of the attention kernel holds at once, for each class of GPU.

`TILES` serves without tuning. No entry in it was measured. Each is derived: the largest tile whose operands
fit the class's shared memory and which ptxas compiles within the bound on spills of tests/triton/
test_compile.py; decode tiles are as high as the packed query heads and deep enough to keep loads in flight.
`fastattn tune` measures on the GPU at hand and writes what it found to the user's cache, which wins.
"""

from __future__ import annotations

from typing import NamedTuple

from .device import Chip


class Tile(NamedTuple):
    """The shape of a program and the compiler options that go with it."""

    block_m: int  # rows of queries
    block_n: int  # keys
    num_warps: int
    num_stages: int  # blocks of keys in flight
    specialize: bool = False  # `plan.Plan.specialize`, where the call allows it


class Need(NamedTuple):
    """What tiles depend on."""

    decode: bool  # few rows of queries: bound by the memory that keys come from
    width: int  # the wider head_dim of keys and values, padded to 64, 128 or 256
    itemsize: int  # of queries or of keys and values, whichever are wider


#: By class: its lowest compute capability and its tiles, (decode, width, itemsize) to tile.
TILES: dict[int, dict[tuple[bool, int, int], Tile]] = {
    # Triton 3.3 dropped Turing's tensor cores: products are float32 FMAs, of halves too.
    75: {
        (False, 64, 2): Tile(32, 32, 4, 1),
        (False, 128, 2): Tile(32, 16, 4, 1),
        (False, 256, 2): Tile(16, 16, 4, 1),
        (False, 64, 4): Tile(32, 32, 4, 1),
        (False, 128, 4): Tile(32, 16, 4, 1),
        (False, 256, 4): Tile(16, 16, 4, 1),
        (True, 64, 2): Tile(32, 32, 4, 1),
        (True, 128, 2): Tile(32, 16, 4, 1),
        (True, 256, 2): Tile(16, 16, 4, 1),
        (True, 64, 4): Tile(32, 32, 4, 1),
        (True, 128, 4): Tile(32, 16, 4, 1),
        (True, 256, 4): Tile(16, 16, 4, 1),
    },
    80: {
        (False, 64, 2): Tile(128, 64, 8, 3),
        (False, 128, 2): Tile(128, 64, 8, 3),
        (False, 256, 2): Tile(64, 32, 8, 2),
        (False, 64, 4): Tile(64, 32, 8, 2),
        (False, 128, 4): Tile(32, 32, 8, 2),
        (False, 256, 4): Tile(32, 16, 8, 2),
        (True, 64, 2): Tile(64, 128, 4, 4),
        (True, 128, 2): Tile(64, 64, 4, 3),
        (True, 256, 2): Tile(32, 32, 4, 3),
        (True, 64, 4): Tile(32, 64, 4, 3),
        (True, 128, 4): Tile(32, 32, 4, 3),
        (True, 256, 4): Tile(16, 16, 4, 3),
    },
    86: {
        (False, 64, 2): Tile(128, 64, 4, 3),
        (False, 128, 2): Tile(128, 32, 8, 3),
        (False, 256, 2): Tile(64, 16, 8, 2),
        (False, 64, 4): Tile(64, 32, 8, 2),
        (False, 128, 4): Tile(32, 16, 8, 2),
        (False, 256, 4): Tile(16, 16, 8, 1),
        (True, 64, 2): Tile(64, 64, 4, 4),
        (True, 128, 2): Tile(64, 32, 4, 4),
        (True, 256, 2): Tile(32, 16, 4, 4),
        (True, 64, 4): Tile(32, 32, 4, 3),
        (True, 128, 4): Tile(32, 16, 4, 3),
        (True, 256, 4): Tile(16, 16, 4, 2),
    },
    90: {
        (False, 64, 2): Tile(128, 128, 8, 3),
        (False, 128, 2): Tile(128, 128, 8, 2),
        (False, 256, 2): Tile(128, 64, 8, 2),
        (False, 64, 4): Tile(64, 32, 8, 2),
        (False, 128, 4): Tile(64, 16, 8, 2),
        (False, 256, 4): Tile(32, 16, 8, 2),
        (True, 64, 2): Tile(64, 128, 4, 3),
        (True, 128, 2): Tile(64, 64, 4, 3),
        (True, 256, 2): Tile(64, 32, 4, 3),
        (True, 64, 4): Tile(32, 64, 4, 3),
        (True, 128, 4): Tile(32, 16, 4, 3),
        (True, 256, 4): Tile(16, 16, 4, 3),
    },
}


def chip_class(capability: int) -> int:
    """The class whose table serves: sm_86, sm_89 and consumer Blackwell have little shared memory."""
    if capability in (86, 89) or capability >= 120:
        return 86
    return max((c for c in TILES if c <= capability and c != 86), default=75)


def tile(chip: Chip, need: Need) -> Tile:
    """The tile for a call on a chip."""
    return TILES[chip_class(chip.capability)][need]
