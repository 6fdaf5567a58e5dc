"""What the integer instructions compute, for the 32 lanes of a warp; every other result is unknown.

No manual states these semantics: they follow the PTX ISA's counterparts and how the compiler uses each form.
"""

from __future__ import annotations

from collections.abc import Callable

from cuda_volta.sass.listing import Instruction
from cuda_volta.sass.paths import arithmetic, logic, reads
from cuda_volta.sass.paths.form import Form, Step, forget

_OPS: dict[str, Callable[[Form], Step]] = {
    "MOV": arithmetic.mov,
    "IADD3": arithmetic.add,
    "IMAD": arithmetic.imad,
    "LEA": arithmetic.lea,
    "SHF": arithmetic.shift,
    "LOP3": logic.logic,
    "PLOP3": logic.predicate_logic,
    "ISETP": logic.compare,
    "FSETP": logic.compare_floats,
    "SEL": logic.choose,
    "IMNMX": arithmetic.minmax,
    "IABS": arithmetic.absolute,
    "PRMT": logic.permute,
    "S2R": reads.special,
    "CS2R": reads.special,
    "SHFL": reads.shuffle,
    "VOTE": reads.vote,
    "P2R": logic.to_register,
    "R2P": logic.to_predicates,
    "LDC": reads.load_constant,
    "LDG": reads.load_global,
    "LD": reads.load_global,
    "LDL": reads.load_local,
    "STL": reads.store_local,
    "I2F": arithmetic.to_float,
    "F2I": arithmetic.to_int,
    "MUFU": arithmetic.reciprocal,
}


def step(item: Instruction) -> Step:
    """What executing ``item`` does to a warp."""
    form = Form(item)
    return _OPS.get(item.base, forget)(form)
