"""Many rows of x: one GEMM that dequantizes W in registers, bound by the tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from ..spec import PackedWeight
from . import launch, tuned
from .dequantize import unit_stride
from .device import chip
from .kernels.linear_many import linear_many_kernel
from .launch import Launch
from .linear_tiles import MANY, LinearNeed, LinearTile, bits, fit, linear_tile, one_group_a_step


def many_rows_tile(x: Tensor, w: PackedWeight) -> LinearTile | None:
    """The tile for a call, or None where the kernel is not the way: no tensor cores for x's type, or steps
    with columns of several groups (act-order, groups cut elsewhere), which would load a scale a value.
    """
    c, need = chip(x.device), LinearNeed(MANY, bits(w))
    t = tuned.load(c).linear.get(need) or linear_tile(c, need)
    if t is None or x.dtype == torch.float32:
        return None
    t = fit(t, x, w)
    if not one_group_a_step(t, w):
        return None
    while t.block_m > 64 and _programs(x.shape[0], w.shape[0], t) < c.processors:
        t = t._replace(block_m=t.block_m // 2)  # or processors would idle
    return t


def run_many(x: Tensor, w: PackedWeight, t: LinearTile) -> Tensor:
    """``x @ W^T + bias`` by a tile of `many_rows_tile`, or one for which `one_group_a_step` holds."""
    rows, out_features = x.shape[0], w.shape[0]
    codes, scales = unit_stride(w.tensors["codes"]), unit_stride(w.tensors["scales"])
    mins = unit_stride(w.tensors["mins"]) if "mins" in w.tensors else None
    bias = None if w.bias is None else unit_stride(w.bias)
    out = x.new_empty((rows, out_features))
    args = (
        x, codes, scales, mins, bias, out, rows, out_features, x.stride(0), codes.stride(0),
        scales.stride(0), 0 if mins is None else mins.stride(0),
    )  # fmt: skip
    constants = (
        w.shape[1], w.group_size, w.group_offset, w.format == "int4", t.block_m, t.block_n, t.block_k
    )  # fmt: skip
    programs = _programs(rows, out_features, t)
    launch.run([Launch(linear_many_kernel, programs, args, constants, t.num_warps, t.num_stages)], x.device)
    return out


def _programs(rows: int, out_features: int, t: LinearTile) -> int:
    return cdiv(rows, t.block_m) * cdiv(out_features, t.block_n)
