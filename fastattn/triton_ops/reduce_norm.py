"""All-reduce, residual and RMSNorm in one kernel over symmetric memory (TokenWeave, 2505.11329).

The caller brackets the launch with barriers of the group: one before, when every rank's partial results are
in its buffer, and one after, before anybody reads the normalised rows. `torch.distributed._symmetric_memory`
gives the buffers' addresses (``buffer_ptrs_dev``), the multicast address where a switch has one, and the
barriers.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from . import launch
from .kernels.reduce_norm import multicast_reduce_norm_kernel, reduce_norm_kernel
from .launch import Launch
from .norm import warps

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def reduce_norm(
    buffers: Tensor,
    world: int,
    dtype: torch.dtype,
    residual: Tensor,
    first_row: int,
    weight: Tensor,
    eps: float,
) -> None:
    """Sums, adds and normalises rows ``first_row ...``, as many as ``residual`` has.

    ``buffers``: int64 (world,), the address of each rank's (rows, hidden) of ``dtype``, contiguous and a
    multiple of 16 bytes, as symmetric memory is; the rows become normalised in all of them. ``residual``
    (share, hidden): this rank's, becomes the new residual. Sums are in float32 in the order of the ranks, and
    so the same whoever computes them. Raises ValueError for a ``residual``, ``weight`` (hidden,) or
    ``buffers`` that is not contiguous.
    """
    _check(residual, weight)
    if not buffers.is_contiguous():
        raise ValueError(f"buffers: strides {buffers.stride()}, expected contiguous addresses")
    share, hidden = residual.shape
    width = next_power_of_2(hidden)
    args = (buffers, residual, weight, first_row, eps)
    constants = (_TYPES[dtype], world, hidden, width)
    launch.run([Launch(reduce_norm_kernel, share, args, constants, warps(width), 1)], residual.device)


def multicast_reduce_norm(
    address: int, dtype: torch.dtype, residual: Tensor, first_row: int, weight: Tensor, eps: float
) -> None:
    """`reduce_norm` through the switch's multicast ``address``: each value crosses a link once each way.

    Needs sm_90, float16 or bfloat16, a hidden size that 8 divides and contiguous tensors; raises ValueError
    for what it can see of that.
    """
    _check(residual, weight)
    share, hidden = residual.shape
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: {dtype}, multicast sums take torch.float16 and torch.bfloat16")
    if hidden % 8:
        raise ValueError(f"hidden: {hidden}, multicast sums take multiples of 8")
    width = next_power_of_2(hidden)
    args = (address, residual, weight, first_row, eps)
    made = Launch(multicast_reduce_norm_kernel, share, args, (_TYPES[dtype], hidden, width), warps(width), 1)
    launch.run([made], residual.device)


def _check(residual: Tensor, weight: Tensor) -> None:
    """The kernels address rows by ``hidden`` and columns by 1."""
    if residual.ndim != 2 or not residual.is_contiguous():
        raise ValueError(
            f"residual: shape {tuple(residual.shape)}, strides {residual.stride()}, "
            "expected contiguous (share, hidden)"
        )
    if weight.shape != residual.shape[1:] or not weight.is_contiguous():
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}, strides {weight.stride()}, "
            f"expected contiguous ({residual.shape[1]},)"
        )
