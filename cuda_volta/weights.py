"""Grouped low-bit matrices as the kernels see them (`kernels/weight.cuh`), and their rows as halves."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import expect, expect_device
from .permute import perm_stride
from .runtime import load
from .variant import Variant

DEQUANTIZE = {
    bits: Variant(
        "dequantize",
        "dequantize.cu",
        "dequantize",
        (("BITS", bits),),
        threads=256,
        min_blocks=4,
        shared_bytes=0,
    )
    for bits in (4, 8)
}
VARIANTS = tuple(DEQUANTIZE.values())


class GroupedWeight(NamedTuple):
    """A matrix W (out, in) of integers in groups: ``w = scales * q + mins``, and the bias beside it.

    ``bits`` 4: ``codes`` uint8 (out, in / 2), in a multiple of 32; every 32 columns take 16 bytes, byte j
    holds column j in its low nibble and column j + 16 in its high one, q in 0..15. ``bits`` 8: ``codes``
    int8 (out, in). Column c belongs to group ``(c + group_offset) // group_size`` or to ``g_idx[c]``, and
    meets column ``x_perm[c]`` of x.
    """

    bits: int
    shape: tuple[int, int]  # (out, in)
    codes: Tensor
    scales: Tensor  # (out, groups), float16 or float32
    mins: Tensor | None  # as scales; None: 0
    group_size: int
    group_offset: int = 0
    g_idx: Tensor | None = None  # int32 (in,)
    x_perm: Tensor | None = None  # int32 or int64 (in,), a permutation
    bias: Tensor | None = None  # (out,), any float dtype; no part of the matrix

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that a kernel may read."""
        return tuple(t for t in self if isinstance(t, Tensor))


class WeightParams(ctypes.Structure):
    """``struct WeightParams`` of weight.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "mins", "g_idx")),
        *((name, ctypes.c_int64) for name in ("codes_row", "scales_row", "mins_row")),
        *((name, ctypes.c_int32) for name in ("out", "in", "group_size", "group_offset", "groups")),
        ("scale_is_float", ctypes.c_int32),
    ]


class DequantizeParams(ctypes.Structure):
    """``struct DequantizeParams`` of dequantize.cu."""

    _fields_ = [
        ("w", WeightParams),
        *((name, ctypes.c_void_p) for name in ("ids", "x_perm", "out")),
        ("first_row", ctypes.c_int64),
        ("perm_stride", ctypes.c_int32),
        ("wide", ctypes.c_int32),
    ]


def weight_params(w: GroupedWeight) -> WeightParams:
    """The kernels' view of a weight. Raises ValueError that names what contradicts its layout."""
    out, inn = w.shape
    groups = w.scales.shape[-1]
    expect("codes", w.codes, (out, inn * w.bits // 8), torch.uint8 if w.bits == 4 else torch.int8)
    expect("scales", w.scales, (out, groups), torch.float16, torch.float32)
    if w.bits == 4 and inn % 32:
        raise ValueError(f"shape: {inn} columns, 4 bits need a multiple of 32")
    if w.group_size < 1 or not 0 <= w.group_offset < w.group_size:
        raise ValueError(
            f"group_size, group_offset: {w.group_size}, {w.group_offset}, expected 0 <= offset < size"
        )
    if w.g_idx is None and inn and (inn - 1 + w.group_offset) // w.group_size >= groups:
        raise ValueError(f"scales: {groups} groups of {w.group_size} columns, fewer than {inn} columns need")
    if inn and not groups:
        raise ValueError(f"scales: no groups, {inn} columns need one")
    if w.mins is not None:
        expect("mins", w.mins, (out, groups), w.scales.dtype)
    for name in ("g_idx", "x_perm"):
        if (t := getattr(w, name)) is not None and not t.is_contiguous():
            raise ValueError(f"{name}: stride {t.stride(0)}, expected 1")
    if w.g_idx is not None:
        expect("g_idx", w.g_idx, (inn,), torch.int32)
    if w.x_perm is not None:
        expect("x_perm", w.x_perm, (inn,), torch.int32, torch.int64)
    expect_device(w.codes, scales=w.scales, mins=w.mins, g_idx=w.g_idx, x_perm=w.x_perm)
    return WeightParams(
        *(None if t is None else t.data_ptr() for t in (w.codes, w.scales, w.mins, w.g_idx)),
        w.codes.stride(0), w.scales.stride(0), 0 if w.mins is None else w.mins.stride(0),
        out, inn, w.group_size, w.group_offset, groups, w.scales.dtype == torch.float32,
    )  # fmt: skip


def dequantize(
    w: GroupedWeight, *, ids: Tensor | None = None, span: tuple[int, int] | None = None, permute: bool = True
) -> Tensor:
    """Rows ``ids`` int64 (N,), or rows [lo, hi), or all of W, as float16 (N, in), rounded once.

    An id outside the matrix is taken as the nearest row. Columns are in x's order; ``permute=False`` leaves
    them as they are stored.
    """
    if ids is not None and (ids.dtype != torch.int64 or ids.ndim != 1):
        raise ValueError(f"ids: {ids.dtype} {tuple(ids.shape)}, expected int64 (N,)")
    p = DequantizeParams(weight_params(w))
    lo, hi = span or (0, w.shape[0])
    p.first_row = lo
    rows = hi - lo if ids is None else ids.shape[0]
    out = w.codes.new_empty((rows, w.shape[1]), dtype=torch.float16)
    reads = list(w._replace(bias=None).tensors())
    if ids is not None:
        expect_device(w.codes, ids=ids)
        ids = ids.contiguous()
        p.ids = ids.data_ptr()
        reads.append(ids)
    if permute and w.x_perm is not None:
        p.x_perm, p.perm_stride = w.x_perm.data_ptr(), perm_stride(w.x_perm)
    p.out, p.wide = out.data_ptr(), w.shape[1] % 8 == 0
    if not out.numel():
        return out
    if not w.shape[0]:
        raise ValueError("ids: the matrix has no rows")
    kernel = load(DEQUANTIZE[w.bits], out.device)
    grid = (rows, -(-w.shape[1] // (8 * kernel.variant.threads)), 1)
    kernel.launch(grid, p, reads=reads, writes=(out,))
    return out
