"""Rotary position embedding, alone and as the append of keys uses it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(
    x, head, heads, cos, sin, position, max_position, head_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Heads of a token (heads, WIDTH) rotated to its position, float32; ``x`` points at its head 0.

    Each lane computes one value of a pair and reads the other: ``x * cos -+ other * sin``. Positions
    outside the table are clamped to it.
    """
    column = tl.arange(0, WIDTH)[None, :]
    turns = column < 2 * HALF
    if INTERLEAVED:
        pair, second = column // 2, column % 2 == 1
        other = column ^ 1
    else:
        pair, second = tl.where(column < HALF, column, column - HALF), column >= HALF
        other = tl.where(second, column - HALF, column + HALF)
    inside = (head < heads) & (column < HEAD_DIM)
    mine = tl.load(x + head * head_stride + column, inside, 0.0).to(tl.float32)
    theirs = tl.load(x + head * head_stride + other, inside & turns, 0.0).to(tl.float32)
    at = tl.minimum(tl.maximum(position, 0), max_position - 1) * HALF + pair
    c = tl.load(cos + at, turns, 1.0)
    s = tl.load(sin + at, turns, 0.0)
    return mine * c + tl.where(second, theirs, -theirs) * s


@triton.jit
def rotary_kernel(
    x, cos, sin, positions, out, heads, max_position, x_stride, head_stride, positions_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token a program; ``out`` is contiguous."""
    pieces = tl.cdiv(heads, HEADS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    head = tl.program_id(0) % pieces * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    position = tl.load(positions + row * positions_stride)
    y = rotated(
        x + row * x_stride, head, heads, cos, sin, position, max_position, head_stride,
        HEAD_DIM, HALF, INTERLEAVED, WIDTH,
    )  # fmt: skip
    at = out + (row * heads + head) * HEAD_DIM + column
    tl.store(at, y.to(out.dtype.element_ty), (head < heads) & (column < HEAD_DIM))
