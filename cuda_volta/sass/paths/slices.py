"""Which instructions a path has to compute: those that a branch, a predicate or an address depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cuda_volta.sass import graph
from cuda_volta.sass.listing import BYTES, Instruction
from cuda_volta.sass.paths import operands as ops

SHARED = ("LDS", "STS", "ATOMS")
GLOBAL = ("LDG", "STG", "LD", "ST", "RED", "ATOM", "ATOMG")
_LOCAL = ("LDL", "STL")
_BRANCHES = ("BRA", "BRX", "EXIT", "RET", "CALL", "KILL")
_PREDICATE0, _LOCAL_BIT = 512, 1 << 600


def needed(code: Sequence[Instruction], blocks: Sequence[graph.Block]) -> list[bool]:
    """Is the result of each instruction needed? A backward slice by liveness over the control-flow graph."""
    keep = [False] * len(code)
    returns = [n for n, b in enumerate(blocks) if blocks and code[blocks[n - 1].last].base == "CALL"]
    after = [tuple(b.successors) + (tuple(returns) if code[b.last].base == "RET" else ()) for b in blocks]
    before: list[list[int]] = [[] for _ in blocks]
    for n, successors in enumerate(after):
        for s in successors:
            before[s].append(n)
    live_in = [-1] * len(blocks)
    work = list(range(len(blocks)))
    while work:
        n = work.pop()
        live = 0
        for s in after[n]:
            live |= max(live_in[s], 0)
        for index in range(blocks[n].last, blocks[n].first - 1, -1):
            live, used = _before(code[index], live)
            keep[index] = keep[index] or used
        if live != live_in[n]:
            live_in[n] = live
            work += before[n]
    return keep


def _before(item: Instruction, live: int) -> tuple[int, bool]:
    """What is live before an instruction, and whether its own result is needed."""
    register, predicates, _ = ops.destinations(item)
    written = _registers(ops.registers_of(*register)) if register else 0
    written |= sum(1 << (_PREDICATE0 + p) for p in predicates)
    reads, conditions = ops.sources(item)
    read = _registers(reads) | sum(1 << (_PREDICATE0 + p) for p in conditions)
    guard = 1 << (_PREDICATE0 + int(item.guard[-1])) if item.guard and item.guard[-1].isdigit() else 0
    used = bool(written & live) or (item.base == "STL" and bool(live & _LOCAL_BIT))
    if used:
        if not item.guard:
            live &= ~written
        live |= read | (_LOCAL_BIT if item.base == "LDL" else 0)
    if item.base in _BRANCHES:
        live |= read
    elif item.base in SHARED + GLOBAL + _LOCAL or item.base in ("HMMA", "SHFL", "BAR"):
        live |= guard
        if item.base in SHARED + GLOBAL:
            addresses = [t for t in item.operands if t.startswith("[")]
            live |= _registers(
                int(n) + up
                for t in addresses
                for n in ops.REGISTER.findall(t)
                for up in range(1 + ("E" in item.modifiers))
            )
    return live, used


def _registers(numbers: Iterable[int]) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << number
    return mask


def index_of(address: int) -> int:
    """The position of the instruction at an address."""
    return address // BYTES
