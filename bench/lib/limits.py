"""Physical limits of this machine, measured in the same run as the rows they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch

from .env import last_level_cache


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes per second that torch's current threads read, from operands of 8 last-level caches.

    The best of ``rounds``: a limit is what the machine can do, not what it does on average. torch.dot
    is the fastest reader among torch's reductions on the processors tried.
    """
    n = 4 * last_level_cache() // 4
    x, y = torch.ones(n), torch.ones(n)
    return 8 * n / _best(lambda: torch.dot(x, y), rounds)


def gemm_rate(dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of a square GEMM. float16 is measured in float32: many CPUs have no fast float16 GEMM."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    x, y = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / _best(lambda: x @ y, rounds)


def _best(call: Callable[[], object], rounds: int) -> float:
    call()
    best = float("inf")
    for _ in range(rounds):
        begin = perf_counter()
        call()
        best = min(best, perf_counter() - begin)
    return best
