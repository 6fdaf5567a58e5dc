"""A function's instructions as the engine takes them."""

from __future__ import annotations

import re

from cuda_volta.sass import pipes
from cuda_volta.sass.listing import Function, Instruction
from cuda_volta.sass.paths import operands
from cuda_volta.sass.simulate.engine import Issued
from cuda_volta.sass.simulate.machine import Latency

_PIPES = {"": 0, "fma": 1, "alu": 2, "tensor": 3, "fp64": 4, "xu": 5, "shared": 6, "global": 7}
_KINDS = {"BAR": 1, "DEPBAR": 2}
_GLOBAL = ("LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG", "LDL", "STL")
_SPECIAL = ("S2R", "LDC")


def convert(function: Function, latency: Latency) -> list[Issued]:
    """Each instruction's pipe, control codes and latency."""
    return [_issued(item, latency) for item in function.instructions]


def _issued(item: Instruction, latency: Latency) -> Issued:
    base, control = item.base, item.control
    name, busy = pipes.pipe(item)
    delay = latency.fixed
    if base in ("LDS", "STS", "ATOMS"):
        name, delay = "shared", latency.shared
    elif base == "SHFL":
        name, delay = "shared", latency.shuffle
    elif base in _GLOBAL:
        name, delay = "global", latency.local if base in ("LDL", "STL") else latency.global_load
    elif base in _SPECIAL:
        name, busy, delay = "", 0, latency.special if base == "S2R" else latency.constant
    elif name == "xu":
        delay = latency.xu
    elif name == "fp64":
        delay = latency.double
    depbar = re.search(r"SB(\d)", item.operands[0]) if base == "DEPBAR" else None
    return Issued(
        pipe=_PIPES[name], kind=_KINDS.get(base, 0), busy=busy, latency=delay, stall=control.stall,
        yields=int(control.yields),
        write_barrier=-1 if control.write_barrier is None else control.write_barrier,
        read_barrier=-1 if control.read_barrier is None else control.read_barrier, wait=control.wait,
        depbar_index=int(depbar[1]) if depbar else 0,
        depbar_count=int(item.operands[1], 16) if depbar else 0, bank_conflict=_bank_conflict(item),
    )  # fmt: skip


def _bank_conflict(item: Instruction) -> int:
    """1 where three operands outside the reuse cache lie in the same of the two register banks.

    Jia et al. 2018, section 2.2: Volta has two banks, each 64 bits wide, an even and an odd one.
    """
    if pipes.pipe(item)[0] not in ("fma", "alu"):
        return 0
    _, _, count = operands.destinations(item)
    banks = [
        int(found[1]) % 2 for text in item.operands[count:]
        if (found := re.search(r"(?<![\w.])R(\d+)", text)) and ".reuse" not in text
    ]  # fmt: skip
    return int(len(banks) >= 3 and len(set(banks)) == 1)
