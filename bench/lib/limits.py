"""Physical limits of this machine, measured in the same run as the rows they stand beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .env import accelerator, last_level_cache
from .timing import stopwatch


class Work(NamedTuple):
    """A call that does nothing but ``amount`` of one thing: bytes read, or floating-point operations."""

    amount: int
    call: Callable[[], object]


def reading() -> Work:
    """Reads operands of 8 last-level caches on torch's current threads.

    torch.dot is the fastest reader among torch's reductions on the processors tried, and as fast as a loop
    of vector loads. On an accelerator the limit is a copy, whose bytes read and written count.
    """
    if accelerator():
        source = torch.ones(8 * last_level_cache(), dtype=torch.uint8)
        target = torch.empty_like(source)
        return Work(2 * source.nbytes, lambda: target.copy_(source))
    n = 4 * last_level_cache() // 4
    x, y = torch.ones(n), torch.ones(n)
    return Work(8 * n, lambda: torch.dot(x, y))


def gemm(dtype: torch.dtype, size: int = 1024) -> Work:
    """A square GEMM. float16 is done in float32 on a CPU: many have no fast float16 GEMM."""
    if accelerator():
        size = 8192
    elif dtype == torch.float16:
        dtype = torch.float32
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
    run = stopwatch(work.call)
    return work.amount / min(run() for _ in range(rounds))
