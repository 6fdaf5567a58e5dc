"""RMSNorm, with the residual's addition in the same pass: each value is read and written once."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..spec import RmsNormArgs
from . import launch
from .kernels.norm import rms_norm_kernel
from .launch import Launch

_TILE = 4096  # values of a program; several rows share one when they are short


def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual), contiguous, in x's dtype; the sum is empty without a residual."""
    hidden = a.x.shape[-1]
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    total = a.x.new_empty(0) if a.residual is None else torch.empty_like(out)
    if not out.numel():
        return out, total
    x = flat_rows(a.x)
    residual = x if a.residual is None else flat_rows(a.residual)
    width = next_power_of_2(hidden)
    group = max(1, _TILE // width)
    args = (
        x, a.weight.contiguous(), residual, out, total, x.shape[0], x.stride(0), residual.stride(0), a.eps
    )  # fmt: skip
    constants = (hidden, width, group, a.residual is not None)
    programs = cdiv(x.shape[0], group)
    launch.run([Launch(rms_norm_kernel, programs, args, constants, warps(width * group), 1)], x.device)
    return out, total


def flat_rows(x: Tensor) -> Tensor:
    """``x`` as (rows, last dimension), unit stride along it; copies only where strides leave no other way."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def warps(values: int) -> int:
    """Warps of a program of so many values: 16 a lane, two 128-bit loads each of half precision."""
    return min(max(values // 512, 1), 16)
