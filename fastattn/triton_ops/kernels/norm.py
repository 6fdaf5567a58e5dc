"""RMSNorm, with the residual's addition in the same pass: each value is read and written once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x, weight, residual, out, total, rows, x_stride, residual_stride, eps,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """ROWS rows of WIDTH >= HIDDEN values a program; `out` and `total` are contiguous."""
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
