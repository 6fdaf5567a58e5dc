"""Launches an emulated kernel: the CPU's counterpart of the driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cuda_volta.emulator.build import library
from cuda_volta.emulator.params import compare_params
from cuda_volta.emulator.report import LineCounts, Report, WarpCounts, publish, recording
from cuda_volta.variant import Variant

if TYPE_CHECKING:
    import torch

MAX_WORKERS = 16

_collisions_allowed = False


@contextlib.contextmanager
def blocks_may_collide() -> Iterator[None]:
    """Lets blocks of a launch touch the same global memory without order while the context is open.

    For tests of hostile indices, which can make any two sequences share their rows. Process-wide.
    """
    global _collisions_allowed  # noqa: PLW0603
    before, _collisions_allowed = _collisions_allowed, True
    try:
        yield
    finally:
        _collisions_allowed = before


class EmulationError(RuntimeError):
    """A check failed: says which, in which kernel, block and thread, at which line and address."""


class Region(ctypes.Structure):
    """``Region`` of machine.hpp."""

    _fields_ = [("begin", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class LaunchArguments(ctypes.Structure):
    """``LaunchArguments`` of launch.cpp."""

    _fields_ = [
        ("params", ctypes.c_void_p),
        ("readable", ctypes.POINTER(Region)),
        ("writable", ctypes.POINTER(Region)),
        ("readable_count", ctypes.c_uint32),
        ("writable_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("blocks_may_collide", ctypes.c_uint32),
    ]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one behind its last; gaps between strided rows count as its own."""
    if not tensor.numel():
        return (0, 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def _regions(tensors: Iterable[torch.Tensor]) -> ctypes.Array[Region]:
    """Tensors as disjoint spans: those that overlap, as views of one storage do, become one."""
    merged: list[list[int]] = []
    for begin, end in sorted(map(_span, tensors)):
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    return (Region * len(merged))(*(Region(begin, end) for begin, end in merged))


class EmulatedKernel:
    """A variant built for the host. Implements ``cuda_volta.variant.Kernel``."""

    def __init__(self, variant: Variant, path: Path) -> None:
        if variant.threads % 32 or not 0 < variant.threads <= 1024:
            raise ValueError(
                f"variant.threads: {variant.threads}, expected whole warps, at most 1024 threads"
            )
        self.variant = variant
        self._library = ctypes.CDLL(str(path))
        self._library.volta_failure.restype = ctypes.c_char_p
        self._library.volta_warp_counts.restype = ctypes.POINTER(WarpCounts)
        self._library.volta_lines.restype = ctypes.POINTER(LineCounts)
        self._lock = threading.Lock()  # a launch and the counts it leaves behind

    def launch(
        self,
        grid: tuple[int, int, int],
        params: ctypes.Structure,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        stream: int | None = None,
        workers: int = 0,
    ) -> None:
        """Runs ``grid`` blocks, ``workers`` at a time (0: one for each processor), and waits for them.

        Raises EmulationError at the first failed check; ``writes`` are then partly written. There are no
        streams: ``stream`` is None or 0.
        """
        self._check(grid, params, stream)
        readable, writable = _regions([*reads, *writes]), _regions(writes)
        arguments = LaunchArguments(
            ctypes.addressof(params),
            readable,
            writable,
            len(readable),
            len(writable),
            (ctypes.c_uint32 * 3)(*grid),
            self.variant.threads,
            self.variant.shared_bytes,
            workers or min(len(os.sched_getaffinity(0)), MAX_WORKERS),
            _collisions_allowed,
        )
        with self._lock:
            if self._library.volta_launch(ctypes.byref(arguments)):
                raise EmulationError(f"{self.variant.name}: {self._library.volta_failure().decode()}")
            if recording():
                publish(self._report(grid))

    def _check(self, grid: tuple[int, int, int], params: ctypes.Structure, stream: int | None) -> None:
        compare_params(self.variant, type(params))
        limits = (2**31 - 1, 2**16 - 1, 2**16 - 1)
        if any(not 0 < n <= most for n, most in zip(grid, limits, strict=True)) or math.prod(grid) >= 2**32:
            raise ValueError(f"grid: {grid}, expected 1 to {limits} blocks and less than 2^32 in all")
        if stream:
            raise ValueError(f"stream: {stream}, the emulator runs on the host and has none")

    def _report(self, grid: tuple[int, int, int]) -> Report:
        count = ctypes.c_size_t()
        entries = self._library.volta_lines(ctypes.byref(count))
        lines = sorted(entries[i].read() for i in range(count.value))
        totals = self._library.volta_warp_counts().contents
        return Report(
            self.variant,
            grid,
            tuple(lines),
            totals.mma,
            totals.shuffles,
            totals.votes,
            totals.warp_barriers,
            totals.block_barriers,
        )


@functools.cache
def load(variant: Variant) -> EmulatedKernel:
    """The kernel of a variant, compiled by g++ at first use and kept on disk.

    Raises ``BuildError`` when there is no g++ or it refuses the source.
    """
    return EmulatedKernel(variant, library(variant))
