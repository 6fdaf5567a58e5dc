"""Packed weights back to floats: rows of an embedding, and slabs of a matrix for a dense GEMM."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..spec import EmbeddingArgs, PackedWeight
from . import launch
from .kernels.dequantize import dequantize_kernel
from .launch import Launch

_TILE = 1024  # values of a program


def dequantize(
    w: PackedWeight, dtype: torch.dtype, ids: Tensor | None = None, first: int = 0, rows: int | None = None,
    stored: bool = False,
) -> Tensor:  # fmt: skip
    """Rows ``ids``, or ``rows`` rows from ``first``, of the matrix (out, in), in ``dtype``.

    ``stored``: columns in the order of the codes rather than of x. Ids out of range are clamped.
    """
    t = w.tensors
    codes = unit_stride(t["weight"] if w.format == "dense" else t["codes"])
    scales = codes if w.format == "dense" else unit_stride(t["scales"])
    mins = unit_stride(t["mins"]) if "mins" in t else None
    count = ids.shape[0] if ids is not None else w.shape[0] - first if rows is None else rows
    out = torch.empty((count, w.shape[1]), dtype=dtype, device=codes.device)
    if out.numel():
        width = min(_TILE, next_power_of_2(w.shape[1]))
        group = min(_TILE // width, next_power_of_2(count))
        args = (
            codes, scales, mins, w.g_idx, None if stored else w.x_perm, ids, out, count, first, w.shape[0],
            0 if ids is None else ids.stride(0), codes.stride(0), scales.stride(0),
            0 if mins is None else mins.stride(0),
        )  # fmt: skip
        constants = (w.shape[1], w.group_size, w.group_offset, w.format, group, width)
        programs = cdiv(count, group) * cdiv(w.shape[1], width)
        launch.run([Launch(dequantize_kernel, programs, args, constants, 4, 1)], out.device)
    return out


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W, (N, in) in ``dtype``: reads those rows only."""
    return dequantize(a.weight, a.dtype, a.ids)


def unit_stride(t: Tensor) -> Tensor:
    """``t`` itself, or a copy when its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
