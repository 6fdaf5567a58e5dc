"""Rotary position embedding."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .checks import expect, expect_device, expect_half
from .runtime import load
from .variant import Variant

ROTARY = Variant("rotary", "rotary.cu", "rotary", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (ROTARY,)


class RotaryTable(ctypes.Structure):
    """``struct RotaryTable`` of rotary.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "at")),
        *((name, ctypes.c_int32) for name in ("positions", "half", "interleaved")),
    ]


class RotaryParams(ctypes.Structure):
    """``struct RotaryParams`` of rotary.cu."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("table", RotaryTable),
        ("x_row", ctypes.c_int64),
        ("x_head", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
    ]


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """``x`` (N, heads, D) float16 rotated to ``positions`` int64 (N,); a new contiguous tensor.

    ``cos`` and ``sin`` float32 (max_position, rotary_dim / 2); dimensions past ``rotary_dim`` pass through.
    Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) where ``interleaved``. A position outside the table is
    taken as the nearest in it.
    """
    expect_half("x", x)
    out = x.new_empty(x.shape)
    table, tensors = rotary_table(x, cos, sin, positions, interleaved)
    if out.numel():
        p = RotaryParams(x.data_ptr(), out.data_ptr(), table, *x.stride()[:2], *x.shape[1:])
        load(ROTARY, x.device).launch((x.shape[0], 1, 1), p, reads=(x, *tensors), writes=(out,))
    return out


def rotary_table(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[RotaryTable, tuple[Tensor, Tensor, Tensor]]:
    """The kernels' view of the angles of ``x`` (N, heads, D), and the tensors it points into."""
    expect_device(x, cos=cos, sin=sin, positions=positions)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype != torch.float32 or t.ndim != 2 or t.shape != cos.shape or 2 * t.shape[1] > x.shape[-1]:
            raise ValueError(
                f"{name}: {t.dtype} {tuple(t.shape)}, "
                f"expected float32 (max_position, at most {x.shape[-1] // 2})"
            )
    if x.shape[0] and not cos.shape[0]:
        raise ValueError(f"cos: {tuple(cos.shape)}, expected at least one position")
    expect("positions", positions, tuple(x.shape[:1]), torch.int64)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    table = RotaryTable(cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), *cos.shape, interleaved)
    return table, (cos, sin, positions)
