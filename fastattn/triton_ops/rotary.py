"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..spec import RotaryArgs
from . import launch
from .kernels.rotary import rotary_kernel
from .launch import Launch


def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor. Positions are clamped to the table."""
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    x = a.x if a.x.stride(-1) == 1 or a.x.shape[-1] == 1 else a.x.contiguous()
    tokens, heads, head_dim = x.shape
    width = next_power_of_2(head_dim)
    group = heads_of_a_program(width)
    args = (
        x, a.cos.contiguous(), a.sin.contiguous(), a.positions, out, tokens * heads, heads, a.cos.shape[0],
        x.stride(0), x.stride(1), a.positions.stride(0),
    )  # fmt: skip
    constants = (head_dim, a.cos.shape[1], a.interleaved, group, width)
    launch.run([Launch(rotary_kernel, cdiv(tokens * heads, group), args, constants, 4, 1)], x.device)
    return out


def heads_of_a_program(width: int) -> int:
    """2048 values: 16 a thread of four warps."""
    return max(1, 2048 // width)
