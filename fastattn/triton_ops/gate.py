"""SwiGLU: ``silu(gate) * up`` of the two halves of each row, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import SwigluArgs

_WIDTH = 1024


@triton.jit
def _swiglu(x, out, x_stride, FEATURES: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < FEATURES
    gate = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + FEATURES + column, inside, 0.0).to(tl.float32)
    # exp(-gate) overflows to infinity for very negative gates, and the quotient is then the right zero.
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * FEATURES + column, gated.to(out.dtype.element_ty), inside)


def swiglu(a: SwigluArgs) -> Tensor:
    """(..., F) of x (..., 2 F), contiguous."""
    features = a.x.shape[-1] // 2
    flat = a.x.reshape(-1, 2 * features)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.empty((*a.x.shape[:-1], features), dtype=a.x.dtype, device=a.x.device)
    if out.numel():
        width = min(_WIDTH, triton.next_power_of_2(features))
        grid = (flat.shape[0], triton.cdiv(features, width))
        _swiglu[grid](flat, out, flat.stride(0), FEATURES=features, WIDTH=width)
    return out
