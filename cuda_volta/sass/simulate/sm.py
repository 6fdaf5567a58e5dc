"""Blocks on one SM: how many fit, and how long they take together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cuda_volta.sass.listing import Function
from cuda_volta.sass.paths import Path
from cuda_volta.sass.simulate import engine, machine, records


class Residency(NamedTuple):
    """What limits the blocks of an SM at a time."""

    warps: int  # of a block
    registers: int  # of a thread
    shared_bytes: int  # of a block

    @property
    def blocks(self) -> int:
        """How many fit; registers of a warp come in units of 256, shared memory in units of 256 bytes."""
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = machine.REGISTERS // of_warp // self.warps
        by_warps = machine.WARPS // self.warps
        shared = -(-self.shared_bytes // 256) * 256
        by_shared = machine.SHARED_BYTES // shared if shared else machine.BLOCKS
        return min(by_registers, by_warps, by_shared, machine.BLOCKS)


class Outcome(NamedTuple):
    """How fast an SM works through blocks, once it runs steadily."""

    cycles_per_block: float  # of the SM: the time between two blocks' ends
    tensor_share: float  # of the tensor cores' cycles that they were busy, start and end included
    reasons: dict[str, float]  # share of the sub-cores' cycles
    fetched_lines: int

    def flops(self, flops_per_block: float, clock_hz: float = machine.CLOCK_HZ) -> float:
        """Operations per second of all SMs."""
        return flops_per_block / self.cycles_per_block * clock_hz * machine.SMS


def run(
    function: Function, paths: Sequence[Sequence[Path]], kinds: Sequence[int], resident: int,
    settings: machine.Machine | None = None, latency: machine.Latency | None = None,
) -> Outcome:  # fmt: skip
    """Runs blocks of the given ``kinds`` in turn; ``paths[kind]`` has one path for each warp of the block.

    The first ``resident`` blocks warm the SM up. The rate is that of the blocks after them, from the mean end
    of the first as many to that of the last: blocks that do not end together are under way at either time.
    """
    if len(kinds) <= resident:
        raise ValueError(f"kinds: {len(kinds)} blocks, expected more than the {resident} resident at a time")
    code = records.convert(function, latency or machine.Latency())
    counted = engine.simulate(settings or machine.Machine(), code, paths, resident, kinds)
    ends = sorted(counted.finished.tolist())
    last = sum(ends[-resident:]) / resident
    cycles = (last - sum(ends[:resident]) / resident) / (len(ends) - resident)
    total = 4 * counted.cycles
    return Outcome(
        cycles,
        counted.tensor_busy / total,
        {k: v / total for k, v in counted.reasons.items()},
        counted.fetched_lines,
    )
