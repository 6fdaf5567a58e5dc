"""Reading group-quantized weights: ``w = scales[:, group] * q (+ mins[:, group])``.

Integers of 8 bits lie one to a byte. Of 4 bits, each 32 columns take 16 bytes: byte j holds column j in its
low nibble and column j + 16 in its high one, so a tile of bytes is two tiles of columns, no bit is shuffled.
"""

import triton
import triton.language as tl


@triton.jit
def groups_of(columns, inn, g_idx, group_size, group_offset):
    """The group of each column; 0 past the last."""
    if g_idx is not None:
        return tl.load(g_idx + columns, mask=columns < inn, other=0)
    return tl.where(columns < inn, (columns + group_offset) // group_size, 0)


@triton.jit
def dequantized(
    q,  # numbers (R, C)
    rows,
    columns,
    scales,
    mins,
    stride_scales,
    out_rows,
    inn,
    g_idx,
    group_size,
    group_offset,
    first,  # of the columns; read when ONE_GROUP
    ONE_GROUP: tl.constexpr,  # all columns of the tile are in one
):
    """float32 (R, C); 0 outside of the matrix."""
    inside = (rows < out_rows)[:, None] & (columns < inn)[None, :]
    if ONE_GROUP:
        group = (first + group_offset) // group_size
        at = rows * stride_scales + group
        scale = tl.load(scales + at, mask=rows < out_rows, other=0.0).to(tl.float32)[:, None]
        if mins is not None:
            low = tl.load(mins + at, mask=rows < out_rows, other=0.0).to(tl.float32)[:, None]
    else:
        group = groups_of(columns, inn, g_idx, group_size, group_offset)
        tile = rows[:, None] * stride_scales + group[None, :]
        scale = tl.load(scales + tile, mask=inside, other=0.0).to(tl.float32)
        if mins is not None:
            low = tl.load(mins + tile, mask=inside, other=0.0).to(tl.float32)
    w = q * scale
    if mins is not None:
        w += low
    return tl.where(inside, w, 0.0)


@triton.jit
def load_bytes(codes, stride, rows, columns, out_rows, width):
    """A tile of bytes as int32; 0 outside."""
    inside = (rows < out_rows)[:, None] & (columns < width)[None, :]
    at = tl.cast(rows, tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(codes + at, mask=inside, other=0).to(tl.int32)
