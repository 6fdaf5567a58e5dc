"""What the planner needs to know of each chip: cores, and the memories that a tile lives in.

Sizes and core counts are those of the vendor compiler's own target table (ascendnpu-ir 1.2.0 prints them into
every module it plans). 310P and 910A are not targets of it: their attention is torch_npu's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    whole_rows: bool = False  # the compiler does not halve a block's rows between the two vector cores


_910B = {"910B1": 24, "910B2": 24, "910B2C": 24, "910B3": 20, "910B4": 20, "910B4-1": 20}
_A3 = {"9362": 20, "9372": 20, "9381": 24, "9382": 24, "9391": 24, "9392": 24}

_950 = {
    "PR_950z": 4,
    **dict.fromkeys(("DT_950x", "DT_950y"), 8),
    **{f"PR_957{n}": 28 for n in "9abcd"},
    **{f"PR_958{n}": 32 for n in "9abcd"},
    **{f"PR_959{n}": 36 for n in "9ab"},
    **{f"DT_957{n}": 28 for n in "12345678"},
    **{f"DT_958{n}": 32 for n in "12345678"},
    **dict.fromkeys(("DT_9591", "DT_9592", "DT_9595", "DT_9596", "DT_95A1", "DT_95A2"), 36),
}
_MEMORIES_950: dict[str, Any] = {"ub": 248 * KIB, "l0c": 256 * KIB, "whole_rows": True}

CHIPS = {
    **{f"Ascend{name}": Chip(f"Ascend{name}", cores, 2 * cores) for name, cores in _910B.items()},
    **{f"Ascend910_{name}": Chip(f"Ascend910_{name}", cores, 2 * cores) for name, cores in _A3.items()},
    **{f"Ascend950{n}": Chip(f"Ascend950{n}", c, 2 * c, **_MEMORIES_950) for n, c in _950.items()},
}
