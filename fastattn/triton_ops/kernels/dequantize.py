"""Packed weights (quant/packed.py) back to floats."""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import clamp


@triton.jit
def _code(codes, column, INT4: tl.constexpr, inside):
    """The integers of the rows that begin at ``codes``, float32."""
    if INT4:
        place = column % 32
        byte = tl.load(codes + column // 32 * 16 + place % 16, inside, 0).to(tl.int32)
        return ((byte >> tl.where(place < 16, 0, 4)) & 15).to(tl.float32)
    return tl.load(codes + column, inside, 0).to(tl.float32)


@triton.jit
def dequantize_kernel(
    codes, scales, mins, g_idx, x_perm, ids, out, rows, first_row, num_rows,
    ids_stride, codes_stride, scales_stride, mins_stride,
    COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_OFFSET: tl.constexpr, FORMAT: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows of WIDTH columns a program: row ``ids[i]``, clamped to the matrix, or ``first_row + i``.

    Absent ``mins``, ``g_idx``, ``x_perm`` and ``ids`` are None.
    """
    pieces: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    place = (tl.program_id(0) // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (place < rows) & (column < COLUMNS)
    if ids is not None:
        row = clamp(tl.load(ids + place * ids_stride, place < rows, 0), 0, num_rows - 1)
    else:
        row = tl.minimum(place + first_row, num_rows - 1)
    if FORMAT == "dense":
        w = tl.load(codes + row * codes_stride + column, inside, 0.0).to(tl.float32)
    else:
        if g_idx is not None:
            group = tl.load(g_idx + column, column < COLUMNS, 0)
        else:
            group = (column + GROUP_OFFSET) // GROUP_SIZE
        w = _code(codes + row * codes_stride, column, FORMAT == "int4", inside)
        w *= tl.load(scales + row * scales_stride + group, inside, 0.0).to(tl.float32)
        if mins is not None:
            w += tl.load(mins + row * mins_stride + group, inside, 0.0).to(tl.float32)
    if x_perm is not None:
        column = tl.load(x_perm + column, column < COLUMNS, 0)
    tl.store(out + place * COLUMNS + column, w.to(out.dtype.element_ty), inside)
