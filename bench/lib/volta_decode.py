"""What decode attention moves, counted in the emulator, and how fast its loads can arrive, simulated."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from cuda_volta import decode as decode_module
from cuda_volta import emulator
from cuda_volta.attention_params import AttentionCall
from cuda_volta.decode import decode
from cuda_volta.sass.paths import follow
from cuda_volta.sass.simulate import machine, run
from cuda_volta.sass.simulate.cache import traffic
from cuda_volta.sass.simulate.calibration import CALIBRATED

from .volta_launch import record
from .volta_model import shipped

KEYS, GROUP = 16384, 4  # of the cache; query heads of its one KV head
_WAVES = 3


class Decode(NamedTuple):
    """One head_dim."""

    moved_ratio: float  # bytes of global memory moved / bytes of keys and values
    splits: int
    gigabytes_per_s: list[float]  # of keys and values, all SMs, on each calibrated machine
    reachable: float  # GB/s: what the simulator's memory gives at most


def measure(head_dim: int) -> Decode:
    """One query of `GROUP` heads over `KEYS` keys, cut as for a V100 with no other work."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, GROUP, head_dim, generator=generator).half()
    k, v = (torch.randn(1, KEYS, 1, head_dim, generator=generator).half() for _ in range(2))
    call = AttentionCall(q, k, v, head_dim**-0.5)
    cache_bytes = 2 * KEYS * head_dim * 2
    with emulator.record() as reports:
        decode(call)
    moved = sum(r.global_bytes("global load") + r.global_bytes("global store") for r in reports)

    first, *_ = record(decode_module, functools.partial(decode, call))
    kernel = shipped(first.variant)
    blocks, splits, _ = first.launch.grid
    middle = (0, splits // 2, 0)
    warps = range(kernel.residency.warps)
    paths = [follow(kernel.program, first.launch, middle, warp) for warp in warps]
    asked = traffic(kernel.function.instructions, paths, paths).asked
    resident = kernel.residency.blocks
    speeds = []
    for on in CALIBRATED:
        settings = on.machine._replace(miss_permille=1000)
        kinds = [0] * (_WAVES * resident)
        outcome = run(kernel.function, [paths], kinds, resident, settings, on.latency)
        share = cache_bytes / (blocks * splits) / asked  # the rest is queries and partial results
        per_second = machine.CLOCK_HZ * machine.SMS / outcome.cycles_per_block
        speeds.append(asked * share * per_second / 1e9)
    reachable = 32 / (CALIBRATED[0].machine.memory_sector / 1000) * machine.CLOCK_HZ * machine.SMS / 1e9
    return Decode(moved / cache_bytes, splits, speeds, reachable)
