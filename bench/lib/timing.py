"""Timing of rivals against each other: one call of each in turn, so that drift meets all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple, TypeVar

import torch

from .env import accelerator, on_gpu

T = TypeVar("T")


class Timing(NamedTuple):
    """Median of the samples, and (max - min) / median."""

    median: float
    spread: float


def summarize(samples: Sequence[float]) -> Timing:
    """Raises ValueError without samples."""
    if not samples:
        raise ValueError("samples: none, expected at least one")
    middle = median(samples)
    return Timing(middle, (max(samples) - min(samples)) / middle if middle else 0.0)


def interleave(runs: Mapping[str, Callable[[], T]], iterations: int, warmup: int) -> dict[str, list[T]]:
    """What each run returned in ``iterations`` rounds, after ``warmup`` rounds whose results are dropped.

    The order rotates from round to round: no run always follows the same other one.
    """
    names = list(runs)
    results: dict[str, list[T]] = {name: [] for name in names}
    for i in range(warmup + iterations):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            result = runs[name]()
            if i >= warmup:
                results[name].append(result)
    return results


def time_calls(
    calls: Mapping[str, Callable[[], object]], seconds: float, rounds: int = 5
) -> dict[str, Timing]:
    """Seconds of each call, interleaved, for at least ``rounds`` rounds and until ``seconds`` have passed."""
    timed = {name: stopwatch(call) for name, call in calls.items()}
    interleave(timed, 0, 1)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, done = perf_counter(), 0
    while done < rounds or perf_counter() - begin < seconds:
        for name, taken in interleave(timed, len(calls), 0).items():
            samples[name] += taken
        done += len(calls)
    return {name: summarize(taken) for name, taken in samples.items()}


def stopwatch(call: Callable[[], object]) -> Callable[[], float]:
    """The call, returning the seconds that it took the device of new tensors."""
    return (_timed_on_gpu if on_gpu() else _timed)(call)


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    """By the host's clock; an accelerator is waited for."""

    def run() -> float:
        device = accelerator()
        begin = perf_counter()
        call()
        if device is not None:
            device.synchronize()
        return perf_counter() - begin

    return run


def _timed_on_gpu(call: Callable[[], object]) -> Callable[[], float]:
    """By events on the stream. The GPU idles before the first, so that the host has enqueued all by then."""

    def run() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # noqa: SLF001
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return run
