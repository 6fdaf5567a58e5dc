"""Builds the engine, once per content of its source, and calls it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path as File
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cuda_volta.cache import Cache, digest
from cuda_volta.emulator.build import compile_with, compiler_version, host_flags
from cuda_volta.sass.paths import Path

_FOLDER = File(__file__).parent
_SOURCES = tuple(_FOLDER / name for name in ("engine.hpp", "instruction_cache.hpp", "engine.cpp"))
REASONS = ("idle", "stalled", "scoreboard", "barrier", "fetching", "pipe busy", "queue full", "issued")
_cache = Cache("sass")
_INT = ctypes.c_int32
_INTS, _SHORTS, _LONGS = (ctypes.POINTER(t) for t in (ctypes.c_int32, ctypes.c_int16, ctypes.c_int64))


class Issued(NamedTuple):
    """An instruction as the engine sees it: `engine.hpp`'s fields, in order."""

    pipe: int
    kind: int
    busy: int
    latency: int
    stall: int
    yields: int
    write_barrier: int
    read_barrier: int
    wait: int
    depbar_index: int
    depbar_count: int
    bank_conflict: int


class Counters(NamedTuple):
    """What the engine counted; ``reasons`` over the cycles of all sub-cores."""

    cycles: int
    finished: npt.NDArray[np.int64]  # cycle at which each block ended
    reasons: dict[str, int]
    tensor_busy: int
    fetched_lines: int


class _Paths(ctypes.Structure):
    _fields_ = [("indices", _INTS), ("costs", _SHORTS), ("offsets", _LONGS), ("warps", _INT)]


class _Result(ctypes.Structure):
    _fields_ = [
        ("cycles", ctypes.c_int64), ("by_reason", ctypes.c_int64 * len(REASONS)),
        ("tensor_busy", ctypes.c_int64), ("fetched_lines", ctypes.c_int64),
    ]  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    options = ["-shared", str(_SOURCES[-1])]
    key = digest(compiler_version(), *host_flags(), *(file.read_bytes() for file in _SOURCES))[:24]
    return ctypes.CDLL(str(_cache.path(f"engine-{key}.so", lambda: compile_with(options))))


def simulate(
    machine: Sequence[int], code: Sequence[Issued], paths: Sequence[Sequence[Path]], resident: int,
    kinds: Sequence[int],
) -> Counters:  # fmt: skip
    """Runs blocks of the given ``kinds``, ``resident`` at a time; ``paths[kind]`` has one path a warp.

    Raises ValueError where the warps of a block wait for each other for ever.
    """
    flat = [path for warps in paths for path in warps]
    indices = np.ascontiguousarray(np.concatenate([p.indices for p in flat]), np.int32)
    costs = np.ascontiguousarray(np.concatenate([p.costs for p in flat]), np.int16)
    offsets = np.cumsum([0, *(len(p.indices) for p in flat)], dtype=np.int64)
    order = np.asarray(kinds, np.int32)
    finished = np.zeros(len(kinds), np.int64)
    table = np.asarray(code, np.int32)
    settings = np.asarray(machine, np.int32)
    given = _Paths(
        indices.ctypes.data_as(_INTS),
        costs.ctypes.data_as(_SHORTS),
        offsets.ctypes.data_as(_LONGS),
        len(paths[0]),
    )
    result = _Result()
    failed = _library().volta_sass_simulate(
        settings.ctypes.data_as(_INTS), table.ctypes.data_as(_INTS), len(code), ctypes.byref(given), resident,
        order.ctypes.data_as(_INTS), len(kinds), finished.ctypes.data_as(_LONGS), ctypes.byref(result),
    )  # fmt: skip
    if failed:
        raise ValueError("paths: the warps of a block wait for each other at a barrier for ever")
    reasons = dict(zip(REASONS, result.by_reason, strict=True))
    return Counters(result.cycles, finished, reasons, result.tensor_busy, result.fetched_lines)
