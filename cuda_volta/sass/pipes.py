"""The pipe bound: how busy a main loop keeps each pipe of an SM sub-core, from its machine code alone.

The busiest pipe bounds a kernel: tensor / busiest is the highest share of the tensor cores' peak that its
code can reach. Dependencies, barriers, bank conflicts and the instruction cache come on top (`simulate`).

Sources of the rates: NVIDIA's "Tesla V100 GPU Architecture" whitepaper (units of a sub-core), the CUDA C++
Programming Guide (arithmetic throughput of compute capability 7.0), and Jia et al., "Dissecting the NVIDIA
Volta GPU Architecture via Microbenchmarking" (2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from cuda_volta.sass import graph
from cuda_volta.sass.listing import BYTES, Function, Instruction

MACS_PER_STEP = 256  # multiply-adds of one HMMA.884 step of a warp
SUB_CORES = 4  # of an SM; they share its load-store port
_XU = ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO")
_MEMORY = ("LDS", "STS", "LDG", "STG", "LDL", "STL", "LD", "ST", "LDC")
_ROUTED = ("SHFL", "RED", "ATOM", "ATOMG", "ATOMS")
_FMA = ("FFMA", "FADD", "FMUL", "IMAD")
_NONE = (
    "BAR", "DEPBAR", "MEMBAR", "NOP", "BRA", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "RET", "CALL", "BMOV",
    "BREAK", "YIELD", "ERRBAR", "CCTL", "BRX", "KILL",
)  # fmt: skip


def pipe(item: Instruction) -> tuple[str, int]:
    """The pipe an instruction keeps busy and for how many of a sub-core's cycles; ("", 0): none.

    tensor: one HMMA.884 step; fma: FP32, FP16 and IMAD on 16 lanes; alu: the other integers, logic, moves and
    compares on 16 lanes; xu: MUFU and conversions on 4 lanes; mio: 128 bytes a cycle, one port for
    `SUB_CORES`; fp64: 8 lanes.
    """
    base = item.base
    if base == "HMMA":
        return "tensor", 2
    if base in _XU:
        return "xu", 8
    if base in _MEMORY:
        return "mio", SUB_CORES * words(item)
    if base in _ROUTED:
        return "mio", SUB_CORES
    if base in _FMA or base.startswith("H"):
        return "fma", 2
    if base in ("DFMA", "DADD", "DMUL", "DSETP"):
        return "fp64", 4
    if base in _NONE:
        return "", 0
    return "alu", 2


def words(item: Instruction) -> int:
    """32-bit words of a lane that a load or store moves."""
    return next((int(m) // 32 for m in item.modifiers if m in ("64", "128")), 1)


class Tally(NamedTuple):
    """What a main loop does for one K/V tile, per warp."""

    cycles: Mapping[str, float]  # of a sub-core, by pipe; "issue": one an instruction
    counts: Mapping[str, float]  # instructions by base opcode
    macs: float  # multiply-adds
    loop_bytes: int
    local_accesses: float  # LDL and STL: registers spilled

    @property
    def busiest(self) -> str:
        """The pipe that bounds the loop."""
        return max(self.cycles, key=lambda name: self.cycles[name])

    @property
    def cycles_per_kmac(self) -> float:
        """Of the busiest pipe, per 1000 multiply-adds; the tensor cores' own limit is 2000 / 256."""
        return 1000 * self.cycles[self.busiest] / self.macs

    @property
    def instructions_per_hmma(self) -> float:
        """Instructions issued for each HMMA step, itself included."""
        return self.cycles["issue"] / self.counts["HMMA"]

    @property
    def barriers(self) -> float:
        """Block-wide barriers a tile."""
        return self.counts.get("BAR", 0.0)


def tally(code: Sequence[Instruction], weights: Iterable[tuple[int, float]], loop_bytes: int) -> Tally:
    """The sum over instructions, each given by index and how often a warp issues it for one tile."""
    cycles: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for index, times in weights:
        name, busy = pipe(code[index])
        counts[code[index].base] += times  # type: ignore[assignment]
        cycles["issue"] += times  # type: ignore[assignment]
        if busy:
            cycles[name] += busy * times  # type: ignore[assignment]
    local = counts["LDL"] + counts["STL"]
    return Tally(dict(cycles), dict(counts), counts["HMMA"] * MACS_PER_STEP, loop_bytes, local)


def main_loop(function: Function) -> tuple[graph.Loop, list[graph.Block], list[graph.Loop]] | None:
    """The outermost loop with the most HMMA, the function's blocks, and the innermost loops with HMMA in it.

    None: no loop holds HMMA.
    """
    code = function.instructions
    blocks = graph.blocks(code)
    found = graph.loops(blocks)

    def hmma(loop: graph.Loop) -> int:
        return sum(code[i].base == "HMMA" for i in loop.instructions(blocks))

    holding = [loop for loop in found if hmma(loop)]
    if not holding:
        return None
    main = max(holding, key=lambda loop: (hmma(loop), len(loop.blocks)))
    inside = [loop for loop in holding if loop.blocks < main.blocks]
    innermost = [loop for loop in inside if not any(other.blocks < loop.blocks for other in inside)]
    return main, blocks, innermost


def static_tally(function: Function, macs_per_warp: float) -> Tally | None:
    """The tally of one K/V tile, of which a warp does ``macs_per_warp`` multiply-adds.

    Straight-line code counts once, branches included (so a bound in the kernel's disfavour where it skips
    code). Each innermost loop with HMMA gets an equal share of the multiply-adds the straight-line code
    leaves; a loop without HMMA counts once. A main loop without inner ones may handle several tiles a trip.
    None: no loop holds HMMA.
    """
    found = main_loop(function)
    if found is None:
        return None
    main, blocks, inner = found
    code = function.instructions
    body = main.instructions(blocks)
    needed = macs_per_warp / MACS_PER_STEP
    total = sum(code[i].base == "HMMA" for i in body)
    weights = dict.fromkeys(body, 1.0)
    if inner:
        own = [loop.instructions(blocks) for loop in inner]
        held = [sum(code[i].base == "HMMA" for i in each) for each in own]
        share = (needed - (total - sum(held))) / len(inner)
        for each, hmma in zip(own, held, strict=True):
            weights.update(dict.fromkeys(each, share / hmma))
    else:
        weights = dict.fromkeys(body, needed / total)
    return tally(code, weights.items(), BYTES * len(body))
