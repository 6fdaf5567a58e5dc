"""Linear layers of grouped low-bit weights (W4A16, W8A16).

A call of few rows reads W once, as integers: 0.5 bytes a weight and its group's share of the scales. For
many rows cuBLAS on a copy in halves is better: per 1000 weights of 4 bits, reading the integers, writing
halves and reading them again moves 4.5 KB (5 ns at 900 GB/s), and the product takes 0.022 ns a row at 90
TFLOP/s; the kernel of few rows takes 0.8 ns for every 16 rows (issue simulator, README.md). The two meet at
180 rows; `FEW_ROWS` lies below, since nothing of this is measured. Where groups are no whole chunks, 16 rows
take 2.2 to 3.4 ns (pieces of 2 to 8 ranks), and 32 about as long as cuBLAS: that kernel gets one tile of
`ROWS`.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import expect, expect_device, expect_half, in_octets
from .permute import permuted
from .runtime import load, processors
from .variant import Variant
from .weights import GroupedWeight, WeightParams, dequantize, weight_params

FEW_ROWS = 64
ROWS = 16  # of x in a block
_WIDE_GROUP = 1 << 15  # from which a division by multiplication would not be exact
_TILE = 1 << 24  # weights that are dequantized at a time


def _variant(entry: str, bits: int, shared_bytes: int) -> Variant:
    """Shared memory: x's operands of 4 steps, and ``shared_bytes`` that depend on the kernel."""
    operands = 4 * 2 * (16 // bits) * 512
    return Variant(
        "linear", f"{entry}.cu", entry, (("BITS", bits),), threads=256, min_blocks=2,
        shared_bytes=operands + shared_bytes,
    )  # fmt: skip


# x's sums of 4 steps, and the scales and minima of up to 17 groups, in fours.
LINEAR = {bits: _variant("linear", bits, 4 * 2 * 256 + 20 * 2 * (128 * 4 + 32)) for bits in (4, 8)}
# The places of 4 steps' columns, a word a warp, and the scales of up to 40 groups.
ANY_GROUPS = {
    bits: _variant("linear_any_groups", bits, places + 8 * 4 + 40 * (64 + 4) * 8)
    for bits, places in ((4, 16 * (32 * 4 + 16)), (8, 16 * 16 * 4))
}
#: Rows of W that a block has.
BLOCK_N = dict.fromkeys(LINEAR.values(), 128) | dict.fromkeys(ANY_GROUPS.values(), 64)
SPLIT_SUM = Variant("linear", "split_sum.cu", "split_sum", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (*LINEAR.values(), *ANY_GROUPS.values(), SPLIT_SUM)


class LinearParams(ctypes.Structure):
    """``struct LinearParams`` of linear.cuh."""

    _fields_ = [
        ("w", WeightParams),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "out", "partial")),
        ("x_row", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("rows", "wide", "bias_is_float", "splits")),
        ("group_inverse", ctypes.c_uint32),
        ("whole_steps", ctypes.c_int32),
    ]


class SplitSumParams(ctypes.Structure):
    """``struct SplitSumParams`` of split_sum.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("partial", "bias", "out")),
        ("size", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("width", "splits", "bias_is_float")),
    ]


def linear(x: Tensor, w: GroupedWeight) -> Tensor:
    """``x @ W^T + bias`` of ``x`` (N, in) float16; returns (N, out) float16.

    Of up to `FEW_ROWS` rows sums are float32, in an order that depends on shapes only. Raises ValueError for
    what the kernels cannot take.
    """
    expect_half("x", x)
    expect_device(x, codes=w.codes, bias=w.bias)
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x: {tuple(x.shape)}, expected (N, {w.shape[1]})")
    if w.bias is not None:
        expect("bias", w.bias, w.shape[:1], torch.float16, torch.float32, torch.bfloat16)
        w = w._replace(bias=(w.bias.float() if w.bias.dtype == torch.bfloat16 else w.bias).contiguous())
    if w.x_perm is not None:
        x = permuted(x, w.x_perm)
    kernel = few_rows_kernel(w, x.shape[0])
    return _many_rows(x, w) if kernel is None else _few_rows(x, w, kernel)


def few_rows_kernel(w: GroupedWeight, rows: int) -> Variant | None:
    """What reads W once for so many rows of x: `LINEAR` where every 16 bytes of codes share a group, else
    `ANY_GROUPS`; None for more rows than pay, or codes that are not aligned.
    """
    columns = 128 // w.bits
    if w.shape[1] % columns or not in_octets(w.codes):
        return None
    whole = w.g_idx is None and w.group_size % columns == 0 and w.group_offset % columns == 0
    divisible = w.group_size < _WIDE_GROUP or _has_one_group(w)
    kernels, most = (LINEAR, FEW_ROWS) if whole and divisible else (ANY_GROUPS, ROWS)
    return kernels[w.bits] if rows <= most else None


def _has_one_group(w: GroupedWeight) -> bool:
    return w.group_offset + w.shape[1] <= w.group_size


def num_splits(blocks: int, columns: int, sms: int) -> int:
    """Into how many ranges of W's columns each of ``blocks`` is cut, to give every SM two.

    One block alone reads at two thirds of an SM's rate (issue simulator). A split's partial sums of 16 rows,
    4 bytes written and read, move as much as 256 columns of 4-bit codes. While all blocks have a place, the
    n-th split takes more off each than their share of that: ranges have at least 512 columns.
    """
    return max(1, min(2 * sms // max(blocks, 1), columns // 512))


def _few_rows(x: Tensor, w: GroupedWeight, variant: Variant) -> Tensor:
    out = x.new_empty((x.shape[0], w.shape[0]))
    p = LinearParams(weight_params(w))
    if not out.numel():
        return out
    p.x, p.x_row, p.rows = x.data_ptr(), x.stride(0), x.shape[0]
    p.wide = in_octets(x)
    if w.bias is not None:
        p.bias, p.bias_is_float = w.bias.data_ptr(), w.bias.dtype == torch.float32
    p.group_inverse = 0 if _has_one_group(w) else -(-(1 << 32) // w.group_size)
    step = 4 * 128 // w.bits
    p.whole_steps = _has_one_group(w) or not (w.group_size % step or w.group_offset % step)
    p.out = out.data_ptr()
    blocks = -(-x.shape[0] // ROWS) * -(-w.shape[0] // BLOCK_N[variant])
    p.splits = num_splits(blocks, w.shape[1], processors(x.device))
    kernel, reads = load(variant, x.device), (x, *w.tensors())
    if p.splits == 1:
        kernel.launch((blocks, 1, 1), p, reads=reads, writes=(out,))
        return out
    partial = x.new_empty((p.splits, *out.shape), dtype=torch.float32)
    p.partial = partial.data_ptr()
    kernel.launch((blocks, p.splits, 1), p, reads=reads, writes=(partial,))
    total = SplitSumParams(p.partial, p.bias, p.out, out.numel(), w.shape[0], p.splits, p.bias_is_float)
    reads = (partial,) if w.bias is None else (partial, w.bias)
    kernel = load(SPLIT_SUM, x.device)
    grid = (-(-w.shape[0] // kernel.variant.threads), x.shape[0], 1)
    kernel.launch(grid, total, reads=reads, writes=(out,))
    return out


def _many_rows(x: Tensor, w: GroupedWeight) -> Tensor:
    """cuBLAS on tiles of W as halves, in the order of W's stored columns."""
    out = x.new_empty((x.shape[0], w.shape[0]))
    step = max(1, _TILE // max(w.shape[1], 1))
    for lo in range(0, w.shape[0], step):
        hi = min(lo + step, w.shape[0])
        matrix = dequantize(w, span=(lo, hi), permute=False)
        out[:, lo:hi] = dense(x, matrix, None if w.bias is None else w.bias[lo:hi])
    return out


def dense(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ matrix^T + bias`` in float16: cuBLAS. A CPU's float16 product is very slow, float32's is not."""
    work = x.dtype if x.device.type == "cuda" else torch.float32
    return F.linear(x.to(work), matrix.to(work), None if bias is None else bias.to(work)).to(x.dtype)
