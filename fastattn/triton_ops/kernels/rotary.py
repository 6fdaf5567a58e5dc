"""Rotary position embedding, alone and as the append of keys uses it."""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import clamp


@triton.jit
def rotated(
    x, valid, cos, sin, position, max_position,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Heads (rows, WIDTH) at pointers ``x`` (rows, 1), rotated to ``position`` (rows, 1), float32.

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
    mine = tl.load(x + column, valid & (column < HEAD_DIM), 0.0).to(tl.float32)
    theirs = tl.load(x + other, valid & turns, 0.0).to(tl.float32)
    at = clamp(position, 0, max_position - 1) * HALF + pair
    c = tl.load(cos + at, valid & turns, 1.0)
    s = tl.load(sin + at, valid & turns, 0.0)
    return mine * c + tl.where(second, theirs, -theirs) * s


@triton.jit
def rotary_kernel(
    x, cos, sin, positions, out, rows, heads, max_position, x_stride, head_stride, positions_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS heads a program, of ``rows`` in all tokens; ``out`` is contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    valid = row < rows
    token, head = row // heads, row % heads
    position = tl.load(positions + token * positions_stride, valid, 0)
    y = rotated(
        x + token * x_stride + head * head_stride, valid, cos, sin, position, max_position,
        HEAD_DIM, HALF, INTERLEAVED, WIDTH,
    )  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(out + row * HEAD_DIM + column, y.to(out.dtype.element_ty), valid & (column < HEAD_DIM))
