"""Rotary position embedding, alone and on the way into the KV cache."""

import triton
import triton.language as tl


@triton.jit
def rotate_row(
    x,  # a token's first head
    out,
    stride_x,  # between heads
    stride_out,
    heads,
    cos,  # the token's row
    sin,
    half,  # pairs that turn; the dimensions past twice as many pass through
    dim,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,  # 0: all turn
):
    """One token, all its heads: pairs (i, i + half), or (2 i, 2 i + 1) when INTERLEAVED."""
    head = tl.arange(0, HEADS)[:, None]
    kind = out.dtype.element_ty
    if INTERLEAVED:
        # Column by column, each with its neighbour: accesses two apart are beyond triton-ascend.
        column = tl.arange(0, 2 * HALF)
        turning = column < 2 * half
        both = (head < heads) & turning[None, :]
        c2 = tl.load(cos + column // 2, mask=turning, other=0.0).to(tl.float32)
        s2 = tl.load(sin + column // 2, mask=turning, other=0.0).to(tl.float32)
        s2 = tl.where(column % 2 == 0, -s2, s2)
        own = tl.load(x + head * stride_x + column[None, :], mask=both, other=0.0).to(tl.float32)
        neighbour = column + 1 - 2 * (column % 2)
        other = tl.load(x + head * stride_x + neighbour[None, :], mask=both, other=0.0).to(tl.float32)
        turned = own * c2[None, :] + other * s2[None, :]
        tl.store(out + head * stride_out + column[None, :], turned.to(kind), mask=both)
    else:
        pair = tl.arange(0, HALF)
        turns = pair < half
        inside = (head < heads) & turns[None, :]
        c = tl.load(cos + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
        first = pair[None, :]
        second = first + half
        a = tl.load(x + head * stride_x + first, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + head * stride_x + second, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + head * stride_out + first, (a * c - b * s).to(kind), mask=inside)
        tl.store(out + head * stride_out + second, (b * c + a * s).to(kind), mask=inside)
    if REST > 0:
        column = 2 * half + tl.arange(0, REST)[None, :]
        beyond = (head < heads) & (column < dim)
        rest = tl.load(x + head * stride_x + column, mask=beyond, other=0.0)
        tl.store(out + head * stride_out + column, rest.to(kind), mask=beyond)


@triton.jit
def rotary_kernel(
    x,
    out,
    cos,
    sin,
    positions,
    stride_xn,
    stride_xh,
    rows,
    heads,
    half,
    dim,
    max_position,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """x (rows, heads, dim), turned by the rows ``positions`` of cos and sin (max_position, half)."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        position = tl.minimum(tl.maximum(tl.load(positions + row), 0), max_position - 1)
        rotate_row(
            x + tl.cast(row, tl.int64) * stride_xn,
            out + tl.cast(row, tl.int64) * heads * dim,
            stride_xh,
            dim,
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
