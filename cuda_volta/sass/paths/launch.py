"""Follows the warps of a launch through a function, lanes diverging and meeting again as its barriers say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cuda_volta.sass import graph
from cuda_volta.sass.listing import BYTES, Function, Instruction
from cuda_volta.sass.paths import operands as ops
from cuda_volta.sass.paths import semantics, slices
from cuda_volta.sass.paths.lanes import TRUE, UNKNOWN, WARP, Value, uniform
from cuda_volta.sass.paths.traffic import SECTOR, sectors, wavefronts
from cuda_volta.sass.paths.warp import Warp

SKIPPED = -1  # the cost of an instruction whose guard is false in every lane
_LONGEST = 20_000_000


class Launch(NamedTuple):
    """What a kernel is started with; addresses need only be distinct, nothing is read from them."""

    parameters: bytes  # the struct that the kernel takes by value
    grid: tuple[int, int, int]
    threads: tuple[int, int, int]  # of a block
    memory: Sequence[tuple[int, bytes]] = ()  # contents that decide branches: lengths, page tables


class Path(NamedTuple):
    """What one warp issues, in order."""

    indices: npt.NDArray[np.int32]  # of instructions
    costs: npt.NDArray[np.int16]  # SKIPPED, or shared wavefronts or global sectors of a memory access, else 0
    sectors: npt.NDArray[np.int64]  # distinct sectors of global memory it touches: addresses / 32
    touches: npt.NDArray[np.int64]  # how often each of them
    guessed: frozenset[int]  # addresses of branches that depend on unknown data


class _Split(NamedTuple):
    """Lanes that run together."""

    at: int
    mask: Value


class Program:
    """A function prepared for following: what to compute, and where its blocks end."""

    def __init__(self, function: Function) -> None:
        self.code = code = function.instructions
        self.literals = function.constants
        blocks = graph.blocks(code)
        self.end = {b.first: b.last for b in blocks}
        keep = slices.needed(code, blocks)
        self.computed = {
            i: (semantics.step(item), _guard(item) if item.guard else None)
            for i, item in enumerate(code) if keep[i]
        }  # fmt: skip
        self.memory = {
            i: (ops.address(item), _guard(item), item) for i, item in enumerate(code)
            if item.base in slices.SHARED + slices.GLOBAL
        }  # fmt: skip
        self.guarded = {
            i: _guard(item) for i, item in enumerate(code)
            if item.guard and item.base in ("LDL", "STL", "HMMA", "SHFL", "BAR")
        }  # fmt: skip
        # Within a block, only these need a look; the rest is issued as it stands.
        self.busy = {
            b.first: [
                i
                for i in range(b.first, b.last + 1)
                if i in self.computed or i in self.memory or i in self.guarded
            ]
            for b in blocks
        }

    def condition(self, item: Instruction) -> list[ops.Fetch]:
        """What a branch or an exit depends on."""
        extra = [o for o in item.operands if ops.is_predicate(o)] if item.base in ("BRA", "EXIT") else []
        return [ops.predicate(p) for p in ([item.guard] if item.guard else []) + extra]


def _guard(item: Instruction) -> ops.Fetch:
    return ops.predicate(item.guard or "PT")


def follow(
    program: Program, launch: Launch, block: tuple[int, int, int], warp: int, once: bool = False
) -> Path:
    """The path of one warp of one block. Raises ValueError where it never ends.

    A branch on unknown data falls through. ``once``: where it jumps forward, it does so from the second time
    on, which makes what it jumps over something that happens once.
    """
    return _Follower(program, launch, block, warp, once).run()


class _Follower:
    def __init__(
        self, program: Program, launch: Launch, block: tuple[int, int, int], warp: int, once: bool
    ) -> None:
        x, y, z = launch.threads
        thread = np.arange(WARP, dtype=np.int64) + WARP * warp
        special = {
            "SR_TID.X": thread % x, "SR_TID.Y": thread // x % y, "SR_TID.Z": thread // (x * y),
            "SR_LANEID": np.arange(WARP, dtype=np.int64),
        }  # fmt: skip
        special |= {f"SR_CTAID.{axis}": uniform(block[n]) for n, axis in enumerate("XYZ")}
        self.program, self.once = program, once
        dimensions = b"".join(n.to_bytes(4, "little") for n in (*launch.threads, *launch.grid))
        self.warp = Warp(launch.parameters, program.literals, special, launch.memory, dimensions)
        self.alive = thread < x * y * z
        self.meetings: dict[str, tuple[Value, Value]] = {}  # barrier -> (lanes that take part, lanes arrived)
        self.places: dict[str, int] = {}  # barrier -> where its lanes go on
        self.indices: list[npt.NDArray[np.int32]] = []
        self.costs: list[npt.NDArray[np.int16]] = []
        self.touched: list[npt.NDArray[np.int64]] = []
        self.guessed: set[int] = set()
        self.length = 0

    def run(self) -> Path:
        splits = [_Split(0, self.alive.copy())]
        while splits:
            at, mask = splits.pop()
            mask = mask & self.alive
            if not mask.any():
                continue
            last = self._issue(at, mask)
            splits += self._leave(last, mask)
        for name, (_, arrived) in self.meetings.items():
            if arrived.any():
                raise ValueError(f"function: lanes wait for ever at {name}")
        every = np.concatenate([np.zeros(0, np.int64), *self.touched])
        distinct, touches = np.unique(every, return_counts=True)
        indices, costs = np.concatenate(self.indices), np.concatenate(self.costs)
        return Path(indices, costs, distinct, touches, frozenset(self.guessed))

    def _issue(self, first: int, mask: Value) -> int:
        """Issues a block from its start; returns its last instruction."""
        program, warp = self.program, self.warp
        last = program.end[first]
        costs = np.zeros(last + 1 - first, np.int16)
        mask = TRUE if mask.all() else mask
        for index in program.busy[first]:
            if index in program.memory:
                address, guard, item = program.memory[index]
                costs[index - first] = self._access(item, address(warp), guard(warp), mask)
            elif index in program.guarded:
                lanes = mask & program.guarded[index](warp)
                if lanes is not UNKNOWN and not lanes.any():
                    costs[index - first] = SKIPPED
            if index in program.computed:
                step, condition = program.computed[index]
                step(warp, mask if condition is None else mask & condition(warp))
        self.indices.append(np.arange(first, last + 1, dtype=np.int32))
        self.costs.append(costs)
        self.length += last + 1 - first
        if self.length > _LONGEST:
            raise ValueError(f"function: the path of a warp is longer than {_LONGEST} instructions")
        return last

    def _access(self, item: Instruction, address: Value, guard: Value, mask: Value) -> int:
        """SKIPPED, or the wavefronts or sectors of an access; of an unknown address, the fewest."""
        lanes = mask if guard is UNKNOWN else mask & guard
        if not lanes.any():
            return SKIPPED
        shared, size = item.base in slices.SHARED, _bytes(item)
        if address is UNKNOWN:
            return max(1, int(lanes.sum()) * size // (128 if shared else SECTOR))
        if shared:
            return wavefronts(address, size, lanes)
        touched = sectors(address, size, lanes)
        self.touched.append(touched)
        return len(touched)

    def _leave(self, last: int, mask: Value) -> list[_Split]:
        """Where the lanes go after a block."""
        item = self.program.code[last]
        following = last + 1
        if item.base == "BSSY":
            self.meetings[item.operands[0]] = mask, ~TRUE
        elif item.base in ("BSYNC", "WARPSYNC"):
            return self._meet(item, last, mask)
        elif item.base in ("BRA", "BRX", "EXIT", "RET", "CALL"):
            # BRA.DIV leaves for code that treats diverged lanes one by one.
            together = bool((mask == self.alive).all())
            taken = ~TRUE if together and "DIV" in item.modifiers else mask
            for fetch in self.program.condition(item):
                taken = taken & fetch(self.warp)
            if taken is UNKNOWN:
                forward = item.base == "BRA" and self._target(item) > last
                again = item.address in self.guessed
                self.guessed.add(item.address)
                taken = mask if self.once and forward and again else ~TRUE
            rest = [_Split(following, mask & ~taken)]
            if item.base == "EXIT":
                self.alive = self.alive & ~taken
                return [*rest, *self._released()]
            return [_Split(self._target(item), taken), *rest]
        return [_Split(following, mask)]

    def _target(self, item: Instruction) -> int:
        if item.target is not None:
            return item.target // BYTES
        if item.base == "RET":
            (register,) = ops.REGISTER.findall(item.operands[0])
            where = self.warp.registers[int(register)]
            if where is not UNKNOWN:
                return int(where[0]) // BYTES
        raise ValueError(f"function: where {item.opcode} at {item.address:#x} goes is not known")

    def _meet(self, item: Instruction, at: int, mask: Value) -> list[_Split]:
        """Lanes wait until all that take part have arrived."""
        name = item.operands[0] if item.base == "BSYNC" else f"WARPSYNC {item.address:#x}"
        expected, arrived = self.meetings.get(name, (self.alive, ~TRUE))
        self.meetings[name] = expected, arrived | mask
        self.places[name] = at + 1
        return self._released()

    def _released(self) -> list[_Split]:
        """The lanes of every barrier at which nobody is awaited any more."""
        free = []
        for name, (expected, arrived) in list(self.meetings.items()):
            if arrived.any() and not (expected & self.alive & ~arrived).any():
                del self.meetings[name]
                free.append(_Split(self.places[name], arrived))
        return free


def _bytes(item: Instruction) -> int:
    """That a lane moves."""
    return next(
        (int(m.lstrip("US")) // 8 for m in item.modifiers if m.lstrip("US") in ("8", "16", "64", "128")), 4
    )
