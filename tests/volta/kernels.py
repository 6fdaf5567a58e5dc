"""Small kernels of the tests' own, in the shared primitives."""

from __future__ import annotations

import ctypes
from pathlib import Path

from cuda_volta.variant import Variant

AXPY = """
#include "primitives.cuh"

using namespace volta;

struct AxpyParams {
    const float* x;
    float* y;
    float a;
    u32 n;
};

VOLTA_KERNEL(axpy, THREADS, 2)(AxpyParams p) {
    u32 i = block_x() * THREADS + thread_index();
    u32 slot = shared_base() + 4 * thread_index();
    sts32(slot, float_bits(i < p.n ? ldg(p.x + i) : 0.0f));
    barrier();
    if (i < p.n) stg(p.y + i, p.a * bits_float(lds32(slot)) + ldg(static_cast<const float*>(p.y) + i));
}
"""


class AxpyParams(ctypes.Structure):
    """As in the source: y += a x."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("a", ctypes.c_float),
        ("n", ctypes.c_uint32),
    )


def axpy(folder: Path, source: str = AXPY, threads: int = 128, shared_bytes: int = 0) -> Variant:
    """The kernel above as a variant whose source lies in ``folder``."""
    file = folder / "axpy.cu"
    file.write_text(source)
    defines = (("THREADS", threads),)
    return Variant("axpy", str(file), "axpy", defines, threads, 2, shared_bytes or 4 * threads)
