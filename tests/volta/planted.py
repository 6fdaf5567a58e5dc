"""Launches the kernels of planted.cu in the emulator."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from cuda_volta.emulator import EmulatedKernel, Report, load, record
from cuda_volta.variant import Variant

SOURCE = Path(__file__).with_suffix(".cu")
PLANTS = re.findall(r"^    ([A-Z_]+),$", SOURCE.read_text(), re.MULTILINE)
SHARED_BYTES = 2048


class Params(ctypes.Structure):
    """Of every kernel but ``one_mma`` and ``arithmetic``."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("in", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("plant", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
    )


class MmaParams(ctypes.Structure):
    """Of ``one_mma``."""

    _fields_ = (
        ("d", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("b_is_row", ctypes.c_uint32),
        ("repeat", ctypes.c_uint32),
    )


class ArithmeticParams(ctypes.Structure):
    """Of ``arithmetic``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("out", "a", "b", "c"))


def variant(entry: str, threads: int, shared_bytes: int = SHARED_BYTES) -> Variant:
    return Variant("test", str(SOURCE), entry, (), threads, 1, shared_bytes)


def kernel(entry: str, threads: int = 32, shared_bytes: int = SHARED_BYTES) -> EmulatedKernel:
    return load(variant(entry, threads, shared_bytes))


def plant(name: str, blocks: int = 1, workers: int = 1) -> torch.Tensor:
    """Runs one case of ``planted`` on 64 threads a block; what ``out`` holds, a row for each 64 words."""
    planted = kernel("planted", 64, 256)
    words = torch.arange(64, dtype=torch.int32) * 3
    out = torch.full((128 * blocks + 1,), -1, dtype=torch.int32)
    out[-1] = 0  # the counter
    params = Params(out.data_ptr(), words.data_ptr(), 0, PLANTS.index(name), 256)
    planted.launch((blocks, 1, 1), params, reads=(words,), writes=(out,), workers=workers)
    return out[:-1].view(2 * blocks, 64)


def one_access(kind: int, addresses: list[int]) -> Report:
    """The report of one access of each lane of a warp; ``kind`` as in planted.cu."""
    table = torch.tensor(addresses, dtype=torch.int32)
    words, out = torch.zeros(4096, dtype=torch.int32), torch.zeros(4096, dtype=torch.int32)
    assert words.data_ptr() % 32 == out.data_ptr() % 32 == 0
    params = Params(out.data_ptr(), words.data_ptr(), table.data_ptr(), kind, SHARED_BYTES)
    with record() as reports:
        kernel("one_access").launch((1, 1, 1), params, reads=(words, table), writes=(out,))
    return reports[0]
