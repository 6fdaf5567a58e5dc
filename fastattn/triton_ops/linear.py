"""``y = x @ W^T`` with W in groups of 4- or 8-bit integers.

Few rows of x: the weight is read once and its codes become half-precision operands in registers; the time is
that of its bytes. W's columns are split over programs so that every SM has loads in flight, and partial sums
are added in a fixed order (`_reduce`), so that results do not depend on timing.

Many rows: W is dequantized slab by slab into memory that stays in L2, and torch's GEMM multiplies; the
slab costs one write and one read of L2 against ``2 * rows`` operations a value.

Dense weights are torch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..spec import LinearArgs, PackedWeight
from .dequantize import dequantize, unit_stride

#: Rows of x above which a slab of W is dequantized for torch's GEMM.
FUSED_ROWS = 128
_SLAB = 1 << 23  # values of a slab: 16 MB in half precision, well inside the L2 of an A100 or H100


@triton.jit
def _small_integer(byte):
    """0..255 as float32 by its bits: an integer-to-float conversion runs at a quarter of this rate."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _group_values(
    values, row, column, row_mask, g_idx, stride, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    GROUP_OFFSET: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Scales or mins of W[row, column], float32."""
    if SCATTERED:
        group = tl.load(g_idx + column, column < COLUMNS, 0)
    else:
        group = (column + GROUP_OFFSET) // GROUP_SIZE
    return tl.load(values + row * stride + group, row_mask & (column < COLUMNS), 0.0).to(tl.float32)


@triton.jit
def _linear(
    x, codes, scales, mins, g_idx, bias, partial, rows, out_features, x_stride, codes_stride, scales_stride,
    mins_stride,
    COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_OFFSET: tl.constexpr, INT4: tl.constexpr,
    MINS: tl.constexpr, SCATTERED: tl.constexpr, UNIFORM: tl.constexpr, BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of x @ W^T over this program's share of the columns.

    A step covers BLOCK_K columns as two halves: for int4 the low and the high nibbles of the same bytes,
    columns 32 c + j and 32 c + 16 + j, so that a byte is loaded once and never rearranged. UNIFORM: all
    columns of a step are of one group, whose scale is loaded once a row of W instead of once a value.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    split = tl.program_id(2)
    half = tl.arange(0, BLOCK_K // 2)
    steps = tl.cdiv(COLUMNS, BLOCK_K)
    low = half // 16 * 32 + half % 16 if INT4 else half
    high = low + 16 if INT4 else half + BLOCK_K // 2
    row_mask = n < out_features
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps * split // SPLITS, steps * (split + 1) // SPLITS):
        begin = step * BLOCK_K
        if INT4:
            byte = begin // 2 + half[:, None]
            packed = tl.load(codes + n * codes_stride + byte, row_mask & (byte < COLUMNS // 2), 0)
        for part in tl.static_range(2):
            column = begin + (low if part == 0 else high)
            k = column[:, None]
            if INT4:
                w = _small_integer((packed & 15) if part == 0 else (packed >> 4))
            else:
                w = tl.load(codes + n * codes_stride + k, row_mask & (k < COLUMNS), 0).to(tl.float32)
            at = begin if UNIFORM else k
            w *= _group_values(
                scales, n, at, row_mask, g_idx, scales_stride, COLUMNS, GROUP_SIZE, GROUP_OFFSET, SCATTERED
            )
            if MINS:
                w += _group_values(
                    mins, n, at, row_mask, g_idx, mins_stride, COLUMNS, GROUP_SIZE, GROUP_OFFSET, SCATTERED
                )
            column = column[None, :]
            values = tl.load(x + m * x_stride + column, (m < rows) & (column < COLUMNS), 0.0)
            total = tl.dot(values, w.to(x.dtype.element_ty), total, input_precision="ieee")
    if BIAS:
        if split == 0:
            total += tl.load(bias + n, row_mask, 0.0).to(tl.float32)
    at = partial + (split * rows + m) * out_features + n
    tl.store(at, total.to(partial.dtype.element_ty), (m < rows) & row_mask)


@triton.jit
def _reduce(partial, out, values, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.load(partial + at, at < values, 0.0)
    for split in range(1, SPLITS):
        total += tl.load(partial + split * values + at, at < values, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < values)


def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` (N, out) in x's dtype."""
    w = a.weight
    if w.format == "dense" and w.x_perm is None:
        return _dense(a.x, w.tensors["weight"], w.bias)
    x = a.x if w.x_perm is None else a.x.index_select(1, w.x_perm)
    if w.format == "dense":
        return _dense(x, w.tensors["weight"], w.bias)
    if not x.numel() or not w.shape[0]:
        bias = 0.0 if w.bias is None else w.bias.to(x.dtype)
        return x.new_zeros((x.shape[0], w.shape[0])) + bias
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return _fused(x, w) if x.shape[0] <= FUSED_ROWS else _through_slabs(x, w)


def _fused(x: Tensor, w: PackedWeight) -> Tensor:
    rows, out_features = x.shape[0], w.shape[0]
    block_m, block_n, block_k, warps = tiles(rows, w)
    splits = _splits(triton.cdiv(rows, block_m) * triton.cdiv(out_features, block_n), w.shape[1] // block_k, x.device)
    t = w.tensors
    codes, scales = unit_stride(t["codes"]), unit_stride(t["scales"])
    mins = unit_stride(t["mins"]) if "mins" in t else scales
    out = x.new_empty((rows, out_features))
    partial = out if splits == 1 else x.new_empty((splits, rows, out_features), dtype=torch.float32)
    _linear[(triton.cdiv(rows, block_m), triton.cdiv(out_features, block_n), splits)](
        x, codes, scales, mins, codes if w.g_idx is None else w.g_idx, codes if w.bias is None else w.bias,
        partial, rows, out_features, x.stride(0), codes.stride(0), scales.stride(0), mins.stride(0),
        COLUMNS=w.shape[1], GROUP_SIZE=w.group_size, GROUP_OFFSET=w.group_offset, INT4=w.format == "int4",
        MINS="mins" in t, SCATTERED=w.g_idx is not None,
        UNIFORM=w.g_idx is None and _common(w) % block_k == 0, BIAS=w.bias is not None, SPLITS=splits,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=4,
    )  # fmt: skip
    if splits > 1:
        values = rows * out_features
        _reduce[(triton.cdiv(values, 1024),)](partial, out, values, SPLITS=splits, WIDTH=1024)
    return out


def tiles(rows: int, w: PackedWeight) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps); a step stays within a group of W where groups are that wide."""
    block_m = max(16, min(64, triton.next_power_of_2(rows)))
    widest = 128 if block_m <= 32 else 64
    shared = widest if w.g_idx is not None else math.gcd(_common(w), widest)
    block_k = shared if shared >= 32 else widest
    return block_m, 64 if block_m <= 32 else 128, block_k, 4 if block_m <= 32 else 8


def _common(w: PackedWeight) -> int:
    """Every multiple of this column begins no group inside a step, steps being its divisors."""
    return math.gcd(w.group_size, w.group_offset)


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """Splits of the columns that bring two programs to each SM.

    A split keeps at least eight steps: every one adds ``8 * rows * out`` bytes of partial sums.
    """
    return max(1, min(triton.cdiv(2 * _processors(device), programs), steps // 8))


def _through_slabs(x: Tensor, w: PackedWeight) -> Tensor:
    out = x.new_empty((x.shape[0], w.shape[0]))
    step = max(128, _SLAB // w.shape[1])
    for first in range(0, w.shape[0], step):
        count = min(step, w.shape[0] - first)
        slab = dequantize(w, x.dtype, first=first, rows=count, stored=True)
        out[:, first : first + count] = _dense(x, slab, None if w.bias is None else w.bias[first : first + count])
    return out


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # in the interpreter: enough to take every path
    return torch.cuda.get_device_properties(device).multi_processor_count
