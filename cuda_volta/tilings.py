"""How the prefill kernels' main loops are cut; `bench/volta_tilings.py` chooses and writes the table."""

from __future__ import annotations

from typing import NamedTuple


class Tiling(NamedTuple):
    """The macros HELD, TRIP, ROLL and BLOCKS of prefill_layout.cuh."""

    held: int  # steps of Q K^T whose Q stays in registers
    trip: int  # steps that are unrolled, of the others
    roll: int  # O += P V at once, in trips of 16 keys, or of 8
    blocks: int  # on an SM; one where warps have 16 rows and blocks eight of them


#: By head_dim and features (`prefill.FEATURES`); the variants for anything are not tuned.
TILINGS = {
    # table
    (32, 0): Tiling(4, 1, 0, 2),
    (32, 1): Tiling(4, 1, 0, 2),
    (32, 2): Tiling(4, 1, 0, 2),
    (64, 0): Tiling(0, 1, 1, 3),
    (64, 1): Tiling(0, 1, 1, 3),
    (64, 2): Tiling(0, 1, 1, 3),
    (96, 0): Tiling(4, 2, 2, 2),
    (96, 1): Tiling(0, 2, 2, 2),
    (96, 2): Tiling(0, 2, 2, 2),
    (128, 0): Tiling(0, 2, 2, 2),
    (128, 1): Tiling(0, 2, 2, 2),
    (128, 2): Tiling(0, 2, 2, 2),
    (160, 0): Tiling(4, 2, 1, 1),
    (160, 1): Tiling(4, 2, 1, 1),
    (160, 2): Tiling(4, 2, 1, 1),
    (192, 0): Tiling(4, 2, 1, 1),
    (192, 1): Tiling(4, 2, 1, 1),
    (192, 2): Tiling(4, 2, 1, 1),
    (256, 0): Tiling(0, 2, 1, 1),
    (256, 1): Tiling(0, 2, 1, 1),
    (256, 2): Tiling(0, 2, 1, 1),
    # end of the table
}
