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
from cuda_volta.sass.paths.traffic import SECTOR
from cuda_volta.sass.simulate import machine, run
from cuda_volta.sass.simulate.calibration import CALIBRATED

from .volta_launch import record
from .volta_model import WAVES, shipped

KEYS, GROUP = 16384, 4  # of the cache whose bytes are counted; query heads of its one KV head
FOLLOWED = 8192  # keys of the cache whose rate is simulated


class Decode(NamedTuple):
    """One head_dim."""

    moved_ratio: float  # bytes of global memory moved / bytes of keys and values
    splits: int
    gigabytes_per_s: list[float]  # of keys and values, by all SMs, on each calibrated machine
    reachable: float  # GB/s: what the simulator's memory gives at most


def measure(head_dim: int) -> Decode:
    """One query of `GROUP` heads over `KEYS` keys.

    Bytes: cut into as many splits as a V100 with no other work needs. Rate: every SM has such a cache to
    itself.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, GROUP, head_dim, generator=generator).half()
    k, v = (torch.randn(1, KEYS, 1, head_dim, generator=generator).half() for _ in range(2))
    call = AttentionCall(q, k, v, head_dim**-0.5)
    cache_bytes = 2 * KEYS * head_dim * 2
    with emulator.record() as reports:
        decode(call)
    moved = sum(r.global_bytes("global load") + r.global_bytes("global store") for r in reports)

    part = call._replace(k=k[:, :FOLLOWED], v=v[:, :FOLLOWED])
    (whole,) = record(decode_module, functools.partial(decode, part, 1))
    kernel = shipped(whole.variant)
    warps = range(kernel.residency.warps)
    paths = [follow(kernel.program, whole.launch, (0, 0, 0), warp) for warp in warps]
    resident = kernel.residency.blocks
    speeds = []
    for on in CALIBRATED:
        settings = on.machine._replace(miss_permille=1000)
        outcome = run(kernel.function, [paths], [0] * (WAVES * resident), resident, settings, on.latency)
        speeds.append(
            cache_bytes * FOLLOWED / KEYS / outcome.cycles_per_block * machine.CLOCK_HZ * machine.SMS / 1e9
        )
    reachable = SECTOR / (CALIBRATED[0].machine.memory_sector / 1000) * machine.CLOCK_HZ * machine.SMS / 1e9
    return Decode(moved / cache_bytes, reports[0].grid[1], speeds, reachable)
