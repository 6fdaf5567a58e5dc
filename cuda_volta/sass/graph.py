"""The control-flow graph of a function: basic blocks and natural loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cuda_volta.sass.listing import BYTES, Instruction

_JUMPS = ("BRA", "BRX", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "KILL")


class Block(NamedTuple):
    """Instructions ``first`` to ``last`` (inclusive), which run in order, and the blocks that may follow."""

    first: int
    last: int
    successors: tuple[int, ...]


class Loop(NamedTuple):
    """A natural loop: its header block and all of its blocks, the inner loops' among them."""

    header: int
    blocks: frozenset[int]

    def instructions(self, blocks: Sequence[Block]) -> list[int]:
        """The indices of its instructions, ascending."""
        return [i for b in sorted(self.blocks) for i in range(blocks[b].first, blocks[b].last + 1)]


def blocks(code: Sequence[Instruction]) -> list[Block]:
    """The basic blocks in address order. A return (RET) and an indirect branch have no successors here."""
    leaders = {0}
    for index, item in enumerate(code):
        if item.target is not None:
            leaders.add(item.target // BYTES)
        if item.base in _JUMPS:
            leaders.add(index + 1)
    starts = sorted(leader for leader in leaders if leader < len(code))
    number = {start: n for n, start in enumerate(starts)}
    found = []
    for n, start in enumerate(starts):
        last = (starts[n + 1] if n + 1 < len(starts) else len(code)) - 1
        end = code[last]
        after = [last + 1] if last + 1 < len(code) else []
        always = end.guard in ("", "PT") and not any(_predicate(o) for o in end.operands)
        if end.base in ("BRA", "CALL"):
            after = [t // BYTES for t in (end.target,) if t is not None] + (
                [] if always and end.base == "BRA" else after
            )
        elif end.base in ("BRX", "RET", "EXIT", "KILL") and always:
            after = []
        found.append(Block(start, last, tuple(dict.fromkeys(number[a] for a in after))))
    return found


def loops(graph: Sequence[Block]) -> list[Loop]:
    """The natural loops, outer before inner. Two back edges to one header are one loop."""
    dominators = _dominators(graph)
    bodies: dict[int, set[int]] = {}
    before: list[list[int]] = [[] for _ in graph]
    for n, block in enumerate(graph):
        for s in block.successors:
            before[s].append(n)
    for n, block in enumerate(graph):
        for header in block.successors:
            if dominators[n] >> header & 1:
                body, work = bodies.setdefault(header, {header}), [n]
                while work:
                    if (at := work.pop()) not in body:
                        body.add(at)
                        work += before[at]
    found = [Loop(header, frozenset(body)) for header, body in bodies.items()]
    return sorted(found, key=lambda loop: (-len(loop.blocks), loop.header))


def _dominators(graph: Sequence[Block]) -> list[int]:
    """For each block the mask of the blocks on every way to it; all ones where none leads there."""
    every = (1 << len(graph)) - 1
    masks = [1] + [every] * (len(graph) - 1)
    changed = True
    while changed:
        changed = False
        incoming = [every] * len(graph)
        for n, block in enumerate(graph):
            for s in block.successors:
                incoming[s] &= masks[n]
        for n in range(1, len(graph)):
            if (mask := incoming[n] | 1 << n) != masks[n]:
                masks[n], changed = mask, True
    # Unreachable blocks keep every bit; they dominate nothing that runs.
    return [mask if n == 0 or mask != every else 0 for n, mask in enumerate(masks)]


def _predicate(operand: str) -> bool:
    """Is the operand of a branch a second condition ("P1", "!P1")?"""
    return operand.lstrip("!")[:1] == "P" and operand.lstrip("!") != "PT"
