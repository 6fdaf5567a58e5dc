"""SwiGLU: ``silu(gate) * up`` of the two halves of each row, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_kernel(x, out, x_stride, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH values of one row a program."""
    pieces: tl.constexpr = (FEATURES + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    inside = column < FEATURES
    gate = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + FEATURES + column, inside, 0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(gate))  # never overflows
    sigmoid = tl.where(gate < 0, decay, 1.0) / (1.0 + decay)
    tl.store(out + row * FEATURES + column, (gate * sigmoid * up).to(out.dtype.element_ty), inside)
