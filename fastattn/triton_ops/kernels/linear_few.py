"""``x @ W^T`` with W in groups of 4- or 8-bit integers (quant/packed.py), dequantized in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _small_integer(byte):
    """0..255 as float32 by its bits: an integer-to-float conversion runs at a quarter of this rate."""
    return (byte.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _group_values(
    values, row, column, row_mask, g_idx, stride, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    GROUP_OFFSET: tl.constexpr,
):  # fmt: skip
    """Scales or mins of W[row, column], float32."""
    if g_idx is not None:
        group = tl.load(g_idx + column, column < COLUMNS, 0)
    else:
        group = (column + GROUP_OFFSET) // GROUP_SIZE
    return tl.load(values + row * stride + group, row_mask & (column < COLUMNS), 0.0).to(tl.float32)


@triton.jit
def linear_kernel(
    x, codes, scales, mins, g_idx, bias, partial, rows, out_features, x_stride, codes_stride, scales_stride,
    mins_stride,
    COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_OFFSET: tl.constexpr, INT4: tl.constexpr,
    UNIFORM: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One (BLOCK_M, BLOCK_N) tile of x @ W^T over this program's share of the columns.

    A step covers BLOCK_K columns as two halves: for int4 the low and the high nibbles of the same bytes,
    columns 32 c + j and 32 c + 16 + j, so that a byte is loaded once and never rearranged. UNIFORM: all
    columns of a step are of one group, whose scale is loaded once a row of W instead of once a value.
    """
    # Programs of the same columns and rows of W are neighbours: they share what they read of it in L2.
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    program = tl.program_id(0)
    m = program % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    # Without a dimension of columns: a value of a row of W is one load of a lane.
    rows_of_w = program // tiles_m % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    n = rows_of_w[None, :]
    split = program // (tiles_m * tiles_n)
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
        if UNIFORM:
            group = (begin + GROUP_OFFSET) // GROUP_SIZE
            inside = rows_of_w < out_features
            scale = tl.load(scales + rows_of_w * scales_stride + group, inside, 0.0).to(tl.float32)[None, :]
            if mins is not None:
                least = tl.load(mins + rows_of_w * mins_stride + group, inside, 0.0).to(tl.float32)[None, :]
        for part in tl.static_range(2):
            column = begin + (low if part == 0 else high)
            k = column[:, None]
            if INT4:
                w = _small_integer((packed & 15) if part == 0 else (packed >> 4))
            else:
                w = tl.load(codes + n * codes_stride + k, row_mask & (k < COLUMNS), 0).to(tl.float32)
            if not UNIFORM:
                scale = _group_values(
                    scales, n, k, row_mask, g_idx, scales_stride, COLUMNS, GROUP_SIZE, GROUP_OFFSET
                )
                if mins is not None:
                    least = _group_values(
                        mins, n, k, row_mask, g_idx, mins_stride, COLUMNS, GROUP_SIZE, GROUP_OFFSET
                    )
            w *= scale
            if mins is not None:
                w += least
            column = column[None, :]
            values = tl.load(x + m * x_stride + column, (m < rows) & (column < COLUMNS), 0.0)
            total = tl.dot(values, w.to(x.dtype.element_ty), total, input_precision="ieee")
    if bias is not None:  # a compile-time fact, unlike what follows
        total += tl.load(bias + n, row_mask & (split == 0), 0.0).to(tl.float32)
    at = partial + (split * rows + m) * out_features + n
    tl.store(at, total.to(partial.dtype.element_ty), (m < rows) & row_mask)


@triton.jit
def reduce_kernel(partial, out, values, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of SPLITS partial results, in their order."""
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    total = tl.load(partial + at, at < values, 0.0)
    for split in range(1, SPLITS):
        total += tl.load(partial + split * values + at, at < values, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < values)
