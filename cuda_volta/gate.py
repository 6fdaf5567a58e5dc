"""The gate of a Llama MLP."""

from __future__ import annotations

import ctypes

from torch import Tensor

from .checks import expect_half, in_octets
from .runtime import load
from .variant import Variant

SWIGLU = Variant("swiglu", "gate.cu", "swiglu", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (SWIGLU,)


class GateParams(ctypes.Structure):
    """``struct GateParams`` of gate.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("wide", ctypes.c_int32),
    ]


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``x`` (..., 2 F) float16, gate first; returns (..., F)."""
    expect_half("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: last dimension {x.shape[-1]} is odd, expected gate and up of equal width")
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    if not out.numel():
        return out
    rows = x if x.ndim == 2 else x.reshape(-1, 2 * width)
    p = GateParams(rows.data_ptr(), out.data_ptr(), rows.stride(0), width, in_octets(rows) and width % 8 == 0)
    grid = (rows.shape[0], -(-width // (8 * SWIGLU.threads)), 1)
    load(SWIGLU, x.device).launch(grid, p, reads=(rows,), writes=(out,))
    return out
