"""What one SM makes of a launch, by both models (docs/volta.md)."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path as File
from typing import NamedTuple

import numpy as np

from cuda_volta import prefill
from cuda_volta.binary import binary
from cuda_volta.sass import graph, listing, pipes
from cuda_volta.sass.paths import Launch, Path, Program, follow
from cuda_volta.sass.simulate import Outcome, Residency, machine, run
from cuda_volta.sass.simulate.cache import traffic
from cuda_volta.sass.simulate.calibration import CALIBRATED, EVERY_FETCH_HITS, Calibrated
from cuda_volta.variant import Variant

from .volta_cases import FOLLOWED, SEQLEN, Case
from .volta_launch import Recorded, record

#: Of blocks through an SM: a rate is taken between the mean ends of the first and the last (docs/volta.md).
WAVES = 4


class Kernel(NamedTuple):
    """Machine code, and what limits how many of its blocks an SM holds."""

    name: str
    function: listing.Function
    program: Program
    residency: Residency
    spill_bytes: int


class Work(NamedTuple):
    """One block of a launch, followed."""

    paths: list[Path]  # of its warps
    tiles: int  # of keys that it passes; warps may skip some
    hmma: int  # steps of all its warps
    miss_permille: int  # of its global traffic


class Static(NamedTuple):
    """What the main loop's code says, for one K/V tile."""

    tally: pipes.Tally
    hot_bytes: int  # of instruction cache lines that every second tile passes at least
    warps: int  # resident on an SM
    spill_bytes: int


@functools.cache
def shipped(variant: Variant) -> Kernel:
    """A variant compiled for sm_70."""
    built = binary(variant, "sm_70")
    function = functions(built.cubin)[variant.entry]
    residency = Residency(variant.threads // 32, built.registers, variant.shared_bytes)
    return Kernel(variant.name, function, Program(function), residency, built.spill_bytes)


def functions(cubin: bytes) -> dict[str, listing.Function]:
    """The functions of a cubin in memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        File(file.name).write_bytes(cubin)
        return listing.read(file.name)


def work(kernel: Kernel, launch: Launch, block: tuple[int, int, int], sharers: int, tiles: int) -> Work:
    """Follows one block; ``sharers`` consecutive blocks of the launch read the same keys and values.

    What a branch on unknown data jumps over (rescaling O) counts once a warp: with random data it is done in
    the first tile and hardly more than once again (emulated:
    test_references_hardly_move_after_the_first_tile; that the code lies so:
    test_rescaling_is_what_a_branch_jumps_over).
    """
    warps = range(kernel.residency.warps)
    paths = [follow(kernel.program, launch, block, warp, once=True) for warp in warps]
    step = 1 if block[0] + 1 < launch.grid[0] else -1
    next_block = (block[0] + step, *block[1:])
    beside = [follow(kernel.program, launch, next_block, warp, once=True) for warp in warps]
    code = kernel.function.instructions
    hmma = np.array([item.base == "HMMA" for item in code])
    steps = sum(int(hmma[p.indices].sum()) for p in paths)
    missing = traffic(code, paths, beside).miss_share(machine.SMS * kernel.residency.blocks, sharers)
    return Work(paths, tiles, steps, round(1000 * missing))


def static(kernel: Kernel, path: Path, macs_per_tile: int) -> Static:
    """The main loop as a warp ran it: the loop that issued most HMMA. Raises ValueError where none does."""
    code = kernel.function.instructions
    times = np.bincount(path.indices, minlength=len(code))
    blocks = graph.blocks(code)
    loops = [loop.instructions(blocks) for loop in graph.loops(blocks)]
    hmma = [sum(int(times[i]) for i in loop if code[i].base == "HMMA") for loop in loops]
    if not any(hmma):
        raise ValueError(f"{kernel.name}: no loop issued HMMA")
    body = loops[hmma.index(max(hmma))]
    tiles = max(hmma) * pipes.MACS_PER_STEP * kernel.residency.warps / macs_per_tile
    tally = pipes.tally(code, ((i, times[i] / tiles) for i in body if times[i]), listing.BYTES * len(body))
    lines = {i // machine.Machine().line_instructions for i in body if 2 * times[i] >= tiles}
    hot = len(lines) * machine.Machine().line_instructions * listing.BYTES
    return Static(tally, hot, kernel.residency.warps * kernel.residency.blocks, kernel.spill_bytes)


def simulate(kernel: Kernel, done: Work, on: Calibrated) -> Outcome:
    """The SM full of such blocks, one after another."""
    resident = kernel.residency.blocks
    settings = on.machine._replace(miss_permille=done.miss_permille)
    return run(kernel.function, [done.paths], [0] * (WAVES * resident), resident, settings, on.latency)


def tflops(
    kernel: Kernel, few: Work, many: Work, tiles: Sequence[int], flops: float, on: Calibrated
) -> float:
    """Of a launch whose blocks pass ``tiles`` K/V tiles each and do ``flops`` together.

    A block's time is a line through two of them, since a long one takes as many tiles as it likes.
    """
    short, long = (simulate(kernel, done, on).cycles_per_block for done in (few, many))
    slope = (long - short) / (many.tiles - few.tiles) if many.tiles != few.tiles else 0.0
    cycles = sum(long + slope * (n - many.tiles) for n in tiles)
    return flops / cycles * machine.CLOCK_HZ * machine.SMS / 1e12


def spread(kernel: Kernel, few: Work, many: Work, tiles: Sequence[int], flops: float) -> list[float]:
    """TFLOP/s on each calibrated machine, and last with an instruction cache that never misses."""
    return [tflops(kernel, few, many, tiles, flops, on) for on in (*CALIBRATED, EVERY_FETCH_HITS)]


class Figures(NamedTuple):
    """Both models' results for one kind of call."""

    static: Static
    tflops: list[float]  # on each calibrated machine
    perfect_fetch: float  # TFLOP/s if every fetch hit


def launched(case: Case, head_dim: int, seqlen: int) -> Recorded:
    """What the library launches for a case."""
    (one,) = record(prefill, functools.partial(prefill.prefill, case.call(seqlen, head_dim)))
    return one


def compiled(case: Case, head_dim: int, variant: Variant | None = None) -> Static:
    """The main loop's code alone, along a block's last warp: a causal bound hides no tile from it."""
    one = launched(case, head_dim, FOLLOWED[0])
    one = one._replace(variant=variant or one.variant)
    kernel = shipped(one.variant)
    path = follow(kernel.program, one.launch, (1, 0, 0), kernel.residency.warps - 1, once=True)
    return static(kernel, path, _tile(one.variant))


def figures(case: Case, head_dim: int, variant: Variant | None = None) -> Figures:
    """Of the prefill kernel that takes a case, or of another that could."""
    followed = []
    for seqlen, block in zip(FOLLOWED, (-3, 1), strict=True):
        one = launched(case, head_dim, seqlen)
        one = one._replace(variant=variant or one.variant)
        kernel = shipped(one.variant)
        v, blocks = one.variant, one.launch.grid[0]
        last_first = blocks - 1 - block % blocks  # the first block takes the last queries
        tiles = _tiles(case, v, last_first * v.block_q, seqlen)
        followed.append(work(kernel, one.launch, (block % blocks, 0, 0), blocks, tiles))
    few, many = followed
    every = [_tiles(case, v, first, SEQLEN) for first in range(0, SEQLEN, v.block_q)]
    *calibrated, perfect = spread(kernel, few, many, every, 4 * case.pairs(SEQLEN) * head_dim)
    return Figures(compiled(case, head_dim, v), calibrated, perfect)


def _tiles(case: Case, variant: Variant, first: int, seqlen: int) -> int:
    """That a block passes, its first query given; bounds of keys are multiples of a tile or one more."""
    return -(-case.visible(first, variant.block_q, seqlen) // variant.block_k)


def _tile(variant: Variant) -> int:
    """Multiply-adds of a block for one K/V tile."""
    return 2 * variant.block_q * variant.block_k * variant.head_dim
