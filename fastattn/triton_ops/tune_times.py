"""What measuring tiles of every kernel has in common: which candidates run, agree, and are fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from triton.errors import TritonError

Call = Callable[[], Tensor]


def agreeing(candidates: Iterator[tuple[object, Call]], expected: Tensor) -> Iterator[tuple[object, Call]]:
    """Those that run here. Raises RuntimeError for one that computes something else than ``expected``."""
    largest = max(1.0, float(expected.abs().max()))
    for name, call in candidates:
        try:
            got = call()
        except (TritonError, RuntimeError):  # out of resources, ptxas; the latter: a pass that failed
            continue
        error = float((got.float() - expected).abs().max())
        if not error <= 16 * torch.finfo(got.dtype).eps * largest:
            raise RuntimeError(f"{name} is {error:.3g} off the served tile's result: please report this")
        yield name, call


def times(calls: Sequence[Call], device: torch.device, rounds: int) -> list[float]:
    """Median seconds of each call; rounds alternate, so that all see the same clock."""
    samples = [[_seconds(call, device) for call in calls] for _ in range(rounds)]
    return [median(column) for column in zip(*samples, strict=True)]


def _seconds(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        begin = perf_counter()
        call()
        return perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The GPU idles before the first event, so that the host has enqueued all by then.
    torch.cuda._sleep(200_000)  # noqa: SLF001
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
