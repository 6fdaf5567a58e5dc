"""``y = x @ W^T`` with W in groups of 4- or 8-bit integers.

Few rows of x: the weight is read once and its codes become half-precision operands in registers; the time is
that of its bytes. W's columns are split over programs so that every SM has loads in flight, and partial sums
are added in a fixed order (`reduce_kernel`), so that results do not depend on timing.

Many rows: W is dequantized slab by slab into memory that stays in L2, and torch's GEMM multiplies; the
slab costs one write and one read of L2 against ``2 * rows`` operations a value.

Dense weights are torch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..spec import LinearArgs, PackedWeight
from . import launch
from .dequantize import dequantize, unit_stride
from .device import Chip, chip
from .kernels.linear import linear_kernel, reduce_kernel
from .launch import Launch

#: Rows of x above which a slab of W is dequantized for torch's GEMM.
FUSED_ROWS = 128
_SLAB = 1 << 23  # values of a slab: 16 MB in half precision, well inside the L2 of an A100 or H100
_STAGES = 4  # loads in flight, in steps
_REDUCED = 1024  # values that a program of the reduction adds


def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` (N, out) in x's dtype."""
    w = a.weight
    if w.format == "dense" and w.x_perm is None:
        return _dense(a.x, w.tensors["weight"], w.bias)
    x = a.x if w.x_perm is None else a.x.index_select(1, w.x_perm)
    if w.format == "dense":
        return _dense(x, w.tensors["weight"], w.bias)
    if not x.numel() or not w.shape[0]:
        bias = 0.0 if w.bias is None else w.bias.to(x.dtype)
        return x.new_zeros((x.shape[0], w.shape[0])) + bias
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return _fused(x, w) if x.shape[0] <= FUSED_ROWS else _through_slabs(x, w)


def _fused(x: Tensor, w: PackedWeight) -> Tensor:
    rows, out_features = x.shape[0], w.shape[0]
    block_m, block_n, block_k, warps = tiles(rows, w)
    programs = cdiv(rows, block_m) * cdiv(out_features, block_n)
    splits = _splits(programs, w.shape[1] // block_k, chip(x.device))
    t = w.tensors
    codes, scales = unit_stride(t["codes"]), unit_stride(t["scales"])
    mins = unit_stride(t["mins"]) if "mins" in t else None
    bias = None if w.bias is None else unit_stride(w.bias)
    out = x.new_empty((rows, out_features))
    partial = out if splits == 1 else x.new_empty((splits, rows, out_features), dtype=torch.float32)
    args = (
        x, codes, scales, mins, w.g_idx, bias, partial, rows, out_features, x.stride(0), codes.stride(0),
        scales.stride(0), 0 if mins is None else mins.stride(0),
    )  # fmt: skip
    uniform = w.g_idx is None and _common(w) % block_k == 0
    constants = (
        w.shape[1], w.group_size, w.group_offset, w.format == "int4", uniform, splits, block_m, block_n,
        block_k,
    )  # fmt: skip
    launches = [Launch(linear_kernel, programs * splits, args, constants, warps, _STAGES)]
    if splits > 1:
        values = rows * out_features
        programs = cdiv(values, _REDUCED)
        launches.append(Launch(reduce_kernel, programs, (partial, out, values), (splits, _REDUCED), 4, 1))
    launch.run(launches, x.device)
    return out


def tiles(rows: int, w: PackedWeight) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps); a step stays within a group of W where groups are that wide."""
    block_m = max(16, min(64, next_power_of_2(rows)))
    widest = 128 if block_m <= 32 else 64
    shared = widest if w.g_idx is not None else math.gcd(_common(w), widest)
    block_k = shared if shared >= 32 else widest
    return block_m, 64 if block_m <= 32 else 128, block_k, 4 if block_m <= 32 else 8


def _common(w: PackedWeight) -> int:
    """Every multiple of this column begins no group inside a step, steps being its divisors."""
    return math.gcd(w.group_size, w.group_offset)


def _splits(programs: int, steps: int, c: Chip) -> int:
    """Splits of the columns that bring two programs to each SM.

    A split keeps at least eight steps: every one adds ``8 * rows * out`` bytes of partial sums.
    """
    return max(1, min(cdiv(2 * c.processors, programs), steps // 8))


def _through_slabs(x: Tensor, w: PackedWeight) -> Tensor:
    out = x.new_empty((x.shape[0], w.shape[0]))
    step = max(128, _SLAB // w.shape[1])
    for first in range(0, w.shape[0], step):
        count = min(step, w.shape[0] - first)
        slab = dequantize(w, x.dtype, first=first, rows=count, stored=True)
        out[:, first : first + count] = _dense(
            x, slab, None if w.bias is None else w.bias[first : first + count]
        )
    return out


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
