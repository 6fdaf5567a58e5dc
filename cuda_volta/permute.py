"""Columns of activations in the order of a weight's stored columns."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .checks import expect, expect_device
from .runtime import load
from .variant import Variant

PERMUTE = Variant("linear", "permute.cu", "permute", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (PERMUTE,)


class PermuteParams(ctypes.Structure):
    """``struct PermuteParams`` of permute.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "x_perm", "out")),
        ("x_row", ctypes.c_int64),
        ("width", ctypes.c_int32),
        ("perm_stride", ctypes.c_int32),
    ]


def permuted(x: Tensor, x_perm: Tensor) -> Tensor:
    """``x[:, x_perm]`` of ``x`` (N, in) float16; an index outside is taken as the nearest inside.

    ``x_perm`` int32 or int64 (in,), contiguous. Raises ValueError for another.
    """
    expect_device(x, x_perm=x_perm)
    expect("x_perm", x_perm, (x.shape[1],), torch.int32, torch.int64)
    if not x_perm.is_contiguous():
        raise ValueError(f"x_perm: stride {x_perm.stride(0)}, expected 1")
    out = x.new_empty(x.shape)
    if out.numel():
        p = PermuteParams(x.data_ptr(), x_perm.data_ptr(), out.data_ptr(), x.stride(0), x.shape[1])
        p.perm_stride = perm_stride(x_perm)
        grid = (x.shape[0], -(-x.shape[1] // PERMUTE.threads), 1)
        load(PERMUTE, x.device).launch(grid, p, reads=(x, x_perm), writes=(out,))
    return out


def perm_stride(x_perm: Tensor) -> int:
    """Distance in 32-bit words of a permutation's entries; kernels read the low word of each."""
    return x_perm.element_size() // 4
