"""How fast the kernel for few rows of x reads a packed weight, by the issue simulator (docs/volta.md)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cuda_volta import linear as linear_module
from cuda_volta.linear import linear
from cuda_volta.sass.paths import follow
from cuda_volta.sass.simulate import machine, run
from cuda_volta.sass.simulate.cache import traffic
from cuda_volta.sass.simulate.calibration import CALIBRATED, EVERY_FETCH_HITS
from cuda_volta.weights import GroupedWeight

from .volta_launch import record
from .volta_model import shipped

OUT, IN, GROUP_SIZE = 16384, 4096, 128  # of the matrix: more blocks than an SM holds, so that none is split
_WAVES = 3


class Linear(NamedTuple):
    """One number of rows and bits."""

    instructions: float  # of a warp, for 1000 weights of a block
    gigabytes_per_s: list[float]  # of codes, by all SMs, on each calibrated machine
    perfect_fetch: float  # the same if every fetch hit


def measure(bits: int, rows: int) -> Linear:
    """``rows`` of x by a matrix whose codes are in memory; x, which all blocks share, is in L2 after the first."""
    dtype = torch.uint8 if bits == 4 else torch.int8
    codes = torch.empty(OUT, IN * bits // 8, dtype=dtype)
    scales = torch.empty(OUT, IN // GROUP_SIZE, dtype=torch.float16)
    w = GroupedWeight(bits, (OUT, IN), codes, scales, scales.clone(), GROUP_SIZE)
    x = torch.empty(rows, IN, dtype=torch.float16)
    (one,) = record(linear_module, functools.partial(linear, x, w))
    kernel = shipped(one.variant)
    warps, resident = range(kernel.residency.warps), kernel.residency.blocks
    paths, beside = ([follow(kernel.program, one.launch, (b, 0, 0), i) for i in warps] for b in (0, 1))
    blocks = one.launch.grid[0]
    missing = traffic(kernel.function.instructions, paths, beside).miss_share(machine.SMS * resident, blocks)
    block_bytes = codes.numel() / blocks
    speeds = []
    for on in (*CALIBRATED, EVERY_FETCH_HITS):
        settings = on.machine._replace(miss_permille=round(1000 * missing))
        outcome = run(kernel.function, [paths], [0] * (_WAVES * resident), resident, settings, on.latency)
        speeds.append(block_bytes / outcome.cycles_per_block * machine.CLOCK_HZ * machine.SMS / 1e9)
    *calibrated, perfect = speeds
    issued = sum(len(p.indices) for p in paths) / len(paths)
    return Linear(issued / (OUT / blocks * IN / 1000), calibrated, perfect)
