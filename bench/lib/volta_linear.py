"""How fast the kernels for few rows of x read a packed weight, by the issue simulator (docs/volta.md)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cuda_volta import linear as linear_module
from cuda_volta.linear import linear
from cuda_volta.sass.paths import follow
from cuda_volta.sass.paths.traffic import SECTOR
from cuda_volta.sass.simulate import machine, run
from cuda_volta.sass.simulate.cache import traffic
from cuda_volta.sass.simulate.calibration import CALIBRATED, EVERY_FETCH_HITS
from cuda_volta.weights import GroupedWeight

from .volta_launch import record
from .volta_model import WAVES, shipped

#: Of the matrix: a block for each place of 80 SMs, so that none is split.
OUT, IN, GROUP_SIZE = 20480, 4096, 128
#: GB/s of all bytes that the simulator's memory gives.
REACHABLE = SECTOR / (CALIBRATED[0].machine.memory_sector / 1000) * machine.CLOCK_HZ * machine.SMS / 1e9


class Linear(NamedTuple):
    """One number of rows and bits."""

    instructions: float  # of a warp, for 1000 weights of a block
    gigabytes_per_s: list[float]  # of codes, by all SMs, on each calibrated machine
    perfect_fetch: float  # the same if every fetch hit
    reachable: float  # GB/s of codes: what the simulator's memory gives beside scales and minima


def measure(bits: int, rows: int, ranks: int = 1) -> Linear:
    """``rows`` of x by a matrix whose codes are in memory; x, which all blocks share, is in L2.

    ``ranks`` above 1: one rank's piece of an act-order matrix has that share of each group's columns, sorted,
    and an index gives their groups: the kernel for any groups. A warp's first step, which the path takes to
    gather scales, is one of 128: rows are four times as long.
    """
    inn = 4 * IN if ranks > 1 else IN
    group_size = GROUP_SIZE // ranks
    dtype = torch.uint8 if bits == 4 else torch.int8
    codes = torch.empty(OUT, inn * bits // 8, dtype=dtype)
    scales = torch.empty(OUT, inn // group_size, dtype=torch.float16)
    groups = torch.arange(inn, dtype=torch.int32) // group_size if ranks > 1 else None
    w = GroupedWeight(bits, (OUT, inn), codes, scales, scales.clone(), group_size, g_idx=groups)
    x = torch.empty(rows, inn, dtype=torch.float16)
    (one,) = record(linear_module, functools.partial(linear, x, w))
    kernel = shipped(one.variant)
    warps, resident = range(kernel.residency.warps), kernel.residency.blocks
    paths, beside = (
        [follow(kernel.program, one.launch, (b, 0, 0), i, once=True) for i in warps] for b in (0, 1)
    )
    blocks = one.launch.grid[0]
    missing = traffic(kernel.function.instructions, paths, beside).miss_share(machine.SMS * resident, blocks)
    block_bytes = codes.nbytes / blocks
    speeds = []
    for on in (*CALIBRATED, EVERY_FETCH_HITS):
        settings = on.machine._replace(miss_permille=round(1000 * missing))
        outcome = run(kernel.function, [paths], [0] * (WAVES * resident), resident, settings, on.latency)
        speeds.append(block_bytes / outcome.cycles_per_block * machine.CLOCK_HZ * machine.SMS / 1e9)
    *calibrated, perfect = speeds
    issued = sum(len(p.indices) for p in paths) / len(paths)
    share = codes.nbytes / (codes.nbytes + 2 * scales.nbytes)
    return Linear(issued / (OUT / blocks * inn / 1000), calibrated, perfect, REACHABLE * share)
