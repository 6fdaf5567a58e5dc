"""Rotary position embedding, alone and as the append of keys uses it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import RotaryArgs


@triton.jit
def rotated(
    x, head, heads, cos, sin, position, max_position, x_head_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of a token's heads (heads, WIDTH) rotated to its position, float32; ``x`` points at its head 0.

    Each lane computes one value of a pair and reads the other: ``x * cos -+ other * sin``. Positions
    outside the table are clamped to it.
    """
    column = tl.arange(0, WIDTH)[None, :]
    turns = column < 2 * HALF
    if INTERLEAVED:
        pair, second = column // 2, column % 2 == 1
        other = column ^ 1
    else:
        pair, second = column % tl.maximum(HALF, 1), column >= HALF
        other = tl.where(second, column - HALF, column + HALF)
    inside = (head < heads) & (column < HEAD_DIM)
    mine = tl.load(x + head * x_head_stride + column, inside, 0.0).to(tl.float32)
    theirs = tl.load(x + head * x_head_stride + other, inside & turns, 0.0).to(tl.float32)
    at = tl.minimum(tl.maximum(position, 0), max_position - 1) * HALF + pair
    c = tl.load(cos + at, turns, 1.0)
    s = tl.load(sin + at, turns, 0.0)
    return mine * c + tl.where(second, theirs, -theirs) * s


@triton.jit
def _rotary(
    x, cos, sin, positions, out, heads, max_position, x_stride, x_head_stride, positions_stride,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    position = tl.load(positions + row * positions_stride)
    y = rotated(
        x + row * x_stride, head, heads, cos, sin, position, max_position, x_head_stride,
        HEAD_DIM, HALF, INTERLEAVED, WIDTH,
    )  # fmt: skip
    at = out + (row * heads + head) * HEAD_DIM + column
    tl.store(at, y.to(out.dtype.element_ty), (head < heads) & (column < HEAD_DIM))


def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor."""
    x = a.x if a.x.stride(-1) == 1 or a.x.shape[-1] == 1 else a.x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, heads, head_dim = x.shape
    if out.numel():
        width = triton.next_power_of_2(head_dim)
        group = heads_of_a_program(heads, width)
        _rotary[(tokens, triton.cdiv(heads, group))](
            x, a.cos.contiguous(), a.sin.contiguous(), a.positions, out, heads, a.cos.shape[0],
            x.stride(0), x.stride(1), a.positions.stride(0),
            HEAD_DIM=head_dim, HALF=a.cos.shape[1], INTERLEAVED=a.interleaved, HEADS=group, WIDTH=width,
        )  # fmt: skip
    return out


def heads_of_a_program(heads: int, width: int) -> int:
    """A power of two: about 2048 values, no more than there are heads."""
    return max(1, min(triton.next_power_of_2(heads), 2048 // width))
