"""Physical limits of this machine, measured in the same run as the rows they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

from .env import last_level_cache


class Work(NamedTuple):
    """A call that does nothing but ``amount`` of one thing: bytes read, or floating-point operations."""

    amount: int
    call: Callable[[], object]


def reading() -> Work:
    """Reads operands of 8 last-level caches on torch's current threads.

    torch.dot is the fastest reader among torch's reductions on the processors tried, and as fast as a loop
    of vector loads.
    """
    n = 4 * last_level_cache() // 4
    x, y = torch.ones(n), torch.ones(n)
    return Work(8 * n, lambda: torch.dot(x, y))


def gemm(dtype: torch.dtype, size: int = 1024) -> Work:
    """A square GEMM. float16 is done in float32: many CPUs have no fast float16 GEMM."""
    dtype = torch.float32 if dtype == torch.float16 else dtype
    x, y = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return Work(2 * size**3, lambda: x @ y)


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes per second."""
    return _best(reading(), rounds)


def gemm_rate(dtype: torch.dtype, rounds: int = 5) -> float:
    """FLOP/s."""
    return _best(gemm(dtype), rounds)


def _best(work: Work, rounds: int) -> float:
    """The best of ``rounds``: what the machine can do, not what it does on average."""
    work.call()
    best = float("inf")
    for _ in range(rounds):
        begin = perf_counter()
        work.call()
        best = min(best, perf_counter() - begin)
    return work.amount / best
