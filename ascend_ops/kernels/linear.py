"""``x @ W^T + bias`` with W dense or in groups of 4 or 8 bits (W4A16, W8A16), dequantized as it is read."""

import triton
import triton.language as tl

from .weights import dequantized, load_bytes


@triton.jit
def _columns(x, stride_x, rows, columns, total_rows, inn):
    inside = (rows < total_rows)[:, None] & (columns < inn)[None, :]
    return tl.load(x + tl.cast(rows, tl.int64)[:, None] * stride_x + columns[None, :], mask=inside, other=0.0)


@triton.jit
def linear_kernel(
    x,
    codes,  # bytes, or the dense matrix
    scales,
    mins,
    g_idx,
    bias,
    out,
    stride_x,
    stride_codes,
    stride_scales,
    rows,
    out_features,
    inn,
    group_size,
    group_offset,
    BITS: tl.constexpr,  # 4, 8, or 16 for dense
    ONE_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # bytes of a row of codes, or columns of a dense one
):
    """Output tiles are dealt out to the cores; neighbours share the rows of W."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles = tiles_m * tl.cdiv(out_features, BLOCK_N)
    width = inn // 2 if BITS == 4 else inn
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, width, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            if BITS == 16:
                w = _columns(codes, stride_codes, n, k, out_features, inn).to(x.dtype.element_ty)
                a = _columns(x, stride_x, m, k, rows, inn)
                acc += tl.dot(a, tl.trans(w), input_precision="ieee")
            elif BITS == 8:
                q = load_bytes(codes, stride_codes, n, k, out_features, width).to(tl.float32)
                w = dequantized(
                    q, n, k, scales, mins, stride_scales, out_features, inn, g_idx, group_size, group_offset,
                    start, ONE_GROUP,
                )  # fmt: skip
                a = _columns(x, stride_x, m, k, rows, inn)
                acc += tl.dot(a, tl.trans(w.to(a.dtype)), input_precision="ieee")
            else:
                byte = load_bytes(codes, stride_codes, n, k, out_features, width)
                low = k // 16 * 32 + k % 16
                high = low + 16
                w = dequantized(
                    (byte & 15).to(tl.float32), n, low, scales, mins, stride_scales, out_features, inn, g_idx,
                    group_size, group_offset, 2 * start, ONE_GROUP,
                )  # fmt: skip
                a = _columns(x, stride_x, m, low, rows, inn)
                acc += tl.dot(a, tl.trans(w.to(a.dtype)), input_precision="ieee")
                w = dequantized(
                    ((byte >> 4) & 15).to(tl.float32), n, high, scales, mins, stride_scales, out_features,
                    inn, g_idx, group_size, group_offset, 2 * start, ONE_GROUP,
                )  # fmt: skip
                a = _columns(x, stride_x, m, high, rows, inn)
                acc += tl.dot(a, tl.trans(w.to(a.dtype)), input_precision="ieee")
        inside = (m < rows)[:, None] & (n < out_features)[None, :]
        if bias is not None:
            acc += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
        at = tl.cast(m, tl.int64)[:, None] * out_features + n[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
