"""RMSNorm, with the residual's addition in the same pass."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .checks import expect, expect_device, expect_half, in_octets
from .runtime import load
from .variant import Variant

RMS_NORM = Variant("rms_norm", "norm.cu", "rms_norm", (), threads=256, min_blocks=4, shared_bytes=32)
VARIANTS = (RMS_NORM,)


class NormParams(ctypes.Structure):
    """``struct NormParams`` of norm.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "out", "total")),
        *((name, ctypes.c_int64) for name in ("x_row", "residual_row")),
        *((name, ctypes.c_int32) for name in ("width", "weight_is_float", "wide")),
        ("eps", ctypes.c_float),
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(``weight * s / sqrt(mean(s^2) + eps)``, s) over the last dimension, s = x + residual.

    ``x`` and ``residual`` (..., hidden) float16; ``weight`` (hidden,) float16 or float32. s is rounded once
    to float16 and empty without a residual. Raises ValueError for what the kernel cannot take.
    """
    expect_half("x", x)
    expect_device(x, weight=weight, residual=residual)
    expect("weight", weight, tuple(x.shape[-1:]), torch.float16, torch.float32)
    out = x.new_empty(x.shape)
    rows, weight = _rows(x), weight.contiguous()
    total = x.new_empty(0)
    p = NormParams(x=rows.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), x_row=rows.stride(0))
    tensors = [rows, weight]
    if residual is not None:
        expect_half("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual: {tuple(residual.shape)}, x is {tuple(x.shape)}")
        total, residual = x.new_empty(x.shape), _rows(residual)
        p.residual, p.residual_row, p.total = residual.data_ptr(), residual.stride(0), total.data_ptr()
        tensors.append(residual)
    if not out.numel():
        return out, total
    p.width, p.eps, p.weight_is_float = x.shape[-1], eps, weight.dtype == torch.float32
    p.wide = in_octets(*tensors) and x.shape[-1] % 8 == 0
    load(RMS_NORM, x.device).launch((rows.shape[0], 1, 1), p, reads=tensors, writes=(out, total))
    return out, total


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
