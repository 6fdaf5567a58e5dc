"""SwiGLU: ``silu(gate) * up`` of the two halves of each row, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from ..spec import SwigluArgs
from . import launch
from .kernels.gate import swiglu_kernel
from .launch import Launch
from .norm import flat_rows

_WIDTH = 1024  # values of a program


def swiglu(a: SwigluArgs) -> Tensor:
    """(..., F) of x (..., 2 F), contiguous."""
    features = a.x.shape[-1] // 2
    out = torch.empty((*a.x.shape[:-1], features), dtype=a.x.dtype, device=a.x.device)
    if out.numel():
        x = flat_rows(a.x)
        width = min(_WIDTH, next_power_of_2(features))
        programs = x.shape[0] * cdiv(features, width)
        launch.run(
            [Launch(swiglu_kernel, programs, (x, out, x.stride(0)), (features, width), 4, 1)], x.device
        )
    return out
