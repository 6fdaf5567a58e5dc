"""Few rows of x: the weight is read once and its codes become half-precision operands in registers.

The time is that of W's bytes. Its columns are split over programs so that every SM has loads in flight, and
partial sums are added in a fixed order (`reduce_kernel`), so that results do not depend on timing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..spec import PackedWeight
from . import launch, tuned
from .dequantize import unit_stride
from .device import Chip, chip
from .kernels.linear_few import linear_kernel, reduce_kernel
from .launch import Launch
from .linear_tiles import LinearNeed, LinearTile, bits, fit, linear_tile, one_group_a_step

_REDUCED = 1024  # values that a program of the reduction adds


def few_rows(x: Tensor, w: PackedWeight) -> Tensor:
    """``x @ W^T + bias`` for up to about 128 rows of x, a packed weight of any groups."""
    c, need = chip(x.device), LinearNeed(max(16, min(64, next_power_of_2(x.shape[0]))), bits(w))
    t = tuned.load(c).linear.get(need) or linear_tile(c, need)
    assert t is not None  # of every class
    return run_few(x, w, t)


def run_few(x: Tensor, w: PackedWeight, t: LinearTile) -> Tensor:
    """`few_rows` by a given tile."""
    rows, out_features = x.shape[0], w.shape[0]
    t = fit(t, x, w)
    programs = cdiv(rows, t.block_m) * cdiv(out_features, t.block_n)
    splits = _splits(programs, w.shape[1] // t.block_k, chip(x.device))
    codes, scales = unit_stride(w.tensors["codes"]), unit_stride(w.tensors["scales"])
    mins = unit_stride(w.tensors["mins"]) if "mins" in w.tensors else None
    bias = None if w.bias is None else unit_stride(w.bias)
    out = x.new_empty((rows, out_features))
    partial = out if splits == 1 else x.new_empty((splits, rows, out_features), dtype=torch.float32)
    args = (
        x, codes, scales, mins, w.g_idx, bias, partial, rows, out_features, x.stride(0), codes.stride(0),
        scales.stride(0), 0 if mins is None else mins.stride(0),
    )  # fmt: skip
    constants = (
        w.shape[1], w.group_size, w.group_offset, w.format == "int4", one_group_a_step(t, w), splits,
        t.block_m, t.block_n, t.block_k,
    )  # fmt: skip
    launches = [Launch(linear_kernel, programs * splits, args, constants, t.num_warps, t.num_stages)]
    if splits > 1:
        values = rows * out_features
        programs = cdiv(values, _REDUCED)
        launches.append(Launch(reduce_kernel, programs, (partial, out, values), (splits, _REDUCED), 4, 1))
    launch.run(launches, x.device)
    return out


def _splits(programs: int, steps: int, c: Chip) -> int:
    """Splits of the columns that bring two programs to each SM.

    A split keeps at least eight steps: every one adds ``8 * rows * out`` bytes of partial sums.
    """
    return max(1, min(cdiv(2 * c.processors, programs), steps // 8))
