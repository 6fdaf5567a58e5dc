"""RMSNorm, with the residual's addition in the same pass: each value is read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import RmsNormArgs

_TILE = 4096  # values of a program; several rows share one when they are short


@triton.jit
def _rms_norm(
    x, weight, residual, out, total, rows, x_stride, residual_stride, eps,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < HIDDEN)
    s = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    if ADD:
        s += tl.load(residual + row * residual_stride + column, inside, 0.0).to(tl.float32)
        rounded = s.to(total.dtype.element_ty)
        tl.store(total + row * HIDDEN + column, rounded, inside)
        s = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(s * s, 1, keep_dims=True) / HIDDEN + eps)
    w = tl.load(weight + column, column < HIDDEN, 0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + column, (s * scale * w).to(out.dtype.element_ty), inside)


def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual), contiguous, in x's dtype; the sum is empty without a residual."""
    hidden = a.x.shape[-1]
    x = _rows(a.x)
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    residual = x if a.residual is None else _rows(a.residual)
    total = a.x.new_empty(0) if a.residual is None else torch.empty_like(out)
    if out.numel():
        width = triton.next_power_of_2(hidden)
        group = max(1, _TILE // width)
        _rms_norm[(triton.cdiv(x.shape[0], group),)](
            x, a.weight.contiguous(), residual, out, total, x.shape[0], x.stride(0), residual.stride(0), a.eps,
            HIDDEN=hidden, WIDTH=width, ROWS=group, ADD=a.residual is not None, num_warps=_warps(width * group),
        )  # fmt: skip
    return out, total


def _rows(x: Tensor) -> Tensor:
    """``x`` as (rows, hidden) with unit stride along hidden; copies only when strides leave no other way."""
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _warps(values: int) -> int:
    """Warps of 16 values a lane: two 128-bit loads each of half precision."""
    return min(max(values // 512, 1), 16)
