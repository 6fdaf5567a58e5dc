"""Rows of a matrix, dequantized: only those rows are read."""

import triton
import triton.language as tl

from .weights import dequantized, load_bytes


@triton.jit
def embedding_kernel(
    ids,
    codes,  # bytes, or the dense matrix
    scales,
    mins,
    g_idx,
    x_perm,  # stored column c is column x_perm[c] of the result; None: the same
    out,
    stride_codes,
    stride_scales,
    count,
    out_features,
    inn,
    group_size,
    group_offset,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,  # bytes of codes, or columns of a dense row
):
    """Row ``ids[i]`` of the matrix into row i of out (count, inn); ids are clamped to the matrix."""
    width = inn // 2 if BITS == 4 else inn
    blocks = tl.cdiv(width, BLOCK)
    for item in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        i = item // blocks
        row = tl.minimum(tl.maximum(tl.load(ids + i), 0), out_features - 1) + tl.arange(0, 1)
        k = item % blocks * BLOCK + tl.arange(0, BLOCK)
        out_row = out + tl.cast(i, tl.int64) * inn
        if BITS == 16:
            at = tl.cast(row, tl.int64)[:, None] * stride_codes + k[None, :]
            w = tl.load(codes + at, mask=(k < inn)[None, :], other=0.0)
            _store(out_row, w, k, x_perm, inn)
        else:
            byte = load_bytes(codes, stride_codes, row, k, out_features, width)
            low = k
            q = byte
            if BITS == 4:
                low = k // 16 * 32 + k % 16
                q = byte & 15
            w = dequantized(
                q.to(tl.float32), row, low, scales, mins, stride_scales, out_features, inn, g_idx, group_size,
                group_offset, 0, False,
            )  # fmt: skip
            _store(out_row, w, low, x_perm, inn)
            if BITS == 4:
                w = dequantized(
                    ((byte >> 4) & 15).to(tl.float32), row, low + 16, scales, mins, stride_scales,
                    out_features, inn, g_idx, group_size, group_offset, 0, False,
                )  # fmt: skip
                _store(out_row, w, low + 16, x_perm, inn)


@triton.jit
def _store(out_row, w, columns, x_perm, inn):
    inside = (columns < inn)[None, :]
    target = columns
    if x_perm is not None:
        target = tl.load(x_perm + columns, mask=columns < inn, other=0)
    tl.store(out_row + target[None, :], w.to(out_row.dtype.element_ty), mask=inside)
