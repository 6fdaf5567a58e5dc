"""What the planner needs to know of each chip: cores, and the memories that a tile lives in.

Sizes and core counts are those of the vendor compiler's own target table (ascendnpu-ir 1.2.0 prints them into
every module it plans); 310P and 910A are not targets of it, and their attention is torch_npu's.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024


class Chip(NamedTuple):
    """One AI processor. A *cube core* multiplies matrices; each has two *vector cores* beside it."""

    name: str  # the compiler's --target
    cube_cores: int
    vector_cores: int
    ub: int = 192 * KIB  # Unified Buffer, of a vector core
    l1: int = 512 * KIB  # of a cube core, and so are the next three
    l0a: int = 64 * KIB
    l0b: int = 64 * KIB
    l0c: int = 128 * KIB


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("Ascend910B1", 24, 48),
        Chip("Ascend910B2", 24, 48),
        Chip("Ascend910B2C", 24, 48),
        Chip("Ascend910B3", 20, 40),
        Chip("Ascend910B4", 20, 40),
    )
}
