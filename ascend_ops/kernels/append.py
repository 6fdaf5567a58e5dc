"""Keys and values into the KV cache, keys rotated on the way: one launch for a layer's whole step."""

import triton
import triton.language as tl

from .rotary import rotate_row


@triton.jit
def copy_row(x, out, stride_x, stride_out, heads, dim, HEADS: tl.constexpr, DIM: tl.constexpr):
    """One token, all its heads, as they are."""
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, DIM)[None, :]
    inside = (head < heads) & (column < dim)
    row = tl.load(x + head * stride_x + column, mask=inside, other=0.0)
    tl.store(out + head * stride_out + column, row.to(out.dtype.element_ty), mask=inside)


@triton.jit
def append_kernel(
    k_cache,
    v_cache,
    k,
    v,
    slots,
    cos,  # float32 (max_position, half), or None
    sin,
    positions,
    stride_kcp,
    stride_kcs,
    stride_kch,
    stride_vcp,
    stride_vcs,
    stride_vch,
    stride_kn,
    stride_kh,
    stride_vn,
    stride_vh,
    rows,
    heads,
    pages,
    page_size,
    half,
    dim,
    v_dim,
    max_position,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
):
    """Row n of k and v goes to slot ``slots[n]``; one that is negative or past the cache is skipped."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        slot = tl.load(slots + row)
        if (slot >= 0) & (slot < tl.cast(pages, tl.int64) * page_size):
            page = slot // page_size
            line = slot % page_size
            k_row = k + tl.cast(row, tl.int64) * stride_kn
            k_out = k_cache + page * stride_kcp + line * stride_kcs
            if cos is not None:
                position = tl.minimum(tl.maximum(tl.load(positions + row), 0), max_position - 1)
                rotate_row(
                    k_row,
                    k_out,
                    stride_kh,
                    stride_kch,
                    heads,
                    cos + position * half,
                    sin + position * half,
                    half,
                    dim,
                    INTERLEAVED,
                    HEADS,
                    HALF,
                    REST,
                )
            else:
                copy_row(k_row, k_out, stride_kh, stride_kch, heads, dim, HEADS, DIM)
            v_row = v + tl.cast(row, tl.int64) * stride_vn
            v_out = v_cache + page * stride_vcp + line * stride_vcs
            copy_row(v_row, v_out, stride_vh, stride_vch, heads, v_dim, HEADS, V_DIM)
