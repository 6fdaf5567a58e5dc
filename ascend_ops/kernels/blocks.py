"""What the attention kernels share: where a sequence lies, which keys a row sees, one step of the softmax.

Valid in upstream Triton and in triton-ascend 3.2. Keys are counted in *slots* of their cache row, padding on
the left included; every index read from device memory is clamped, so that a bad one gives a wrong answer
and no stray access.
"""

import triton
import triton.language as tl

#: Below every score, and finite: ``LOWEST - LOWEST`` is 0 where an infinity would give NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
HIDDEN = tl.constexpr(-float("inf"))


@triton.jit
def query_span(b, cu_seqlens_q, seqlen_q, total_q):
    """(first row, number of queries) of sequence ``b``; the row is 0 when ``b`` has a stride of its own."""
    first = 0
    count = seqlen_q
    if cu_seqlens_q is not None:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_q + b), 0), total_q)
        count = tl.minimum(tl.load(cu_seqlens_q + b + 1), total_q) - first
    return first, count


@triton.jit
def key_span(b, cu_seqlens_k, seqused_k, cache_leftpad, cache_batch_idx, capacity, rows_k):
    """(cache row, first row in it, first slot, end slot) of the keys of sequence ``b``.

    ``capacity`` is the number of slots a sequence can have, ``rows_k`` that of cache rows, or of all packed
    keys.
    """
    row = b
    first = 0
    stop = capacity
    if cu_seqlens_k is not None:
        row = 0
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens_k + b), 0), rows_k)
        stop = tl.minimum(tl.load(cu_seqlens_k + b + 1), rows_k) - first
    if cache_batch_idx is not None:
        row = tl.minimum(tl.maximum(tl.load(cache_batch_idx + b), 0), rows_k - 1)
    if seqused_k is not None:
        stop = tl.minimum(tl.load(seqused_k + b), stop)
    start = 0
    if cache_leftpad is not None:
        start = tl.minimum(tl.maximum(tl.load(cache_leftpad + b), 0), stop)
    return row, first, start, stop


@triton.jit
def diagonal(b, q_pos0, k_pos0, queries, start, stop):
    """Slot that has the position of the first query of ``b``: bottom-right aligned unless told otherwise."""
    slot = stop - queries
    if q_pos0 is not None:
        slot = start + tl.load(q_pos0 + b)
        if k_pos0 is not None:
            slot = slot - tl.load(k_pos0 + b)
    return slot


@triton.jit
def block_offset(b, slot, block_table, stride_table, pages, page_size, stride_page, stride_row):
    """Elements from the start of a sequence's cache to ``slot``; a block never crosses a page."""
    offset = tl.cast(slot, tl.int64) * stride_row
    if block_table is not None:
        page = tl.load(block_table + b * stride_table + slot // page_size)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        offset = tl.cast(page, tl.int64) * stride_page + tl.cast(slot % page_size, tl.int64) * stride_row
    return offset


@triton.jit
def load_tile(pointer, stride, rows, columns, row_limit, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows below ``row_limit`` of a matrix, zeros elsewhere; ``columns`` reach past WIDTH when PADDED."""
    where = pointer + rows[:, None] * stride + columns[None, :]
    if PADDED:
        return tl.load(where, mask=(rows < row_limit)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tl.load(where, mask=(rows < row_limit)[:, None], other=0.0)


@triton.jit
def head_of_sequence(cache, kh, stride_head, row, stride_row, first, stride_slot, block_table):
    """Where a sequence's keys or values of KV head ``kh`` begin; in pages, where the head's begin."""
    base = cache + tl.cast(kh, tl.int64) * stride_head
    if block_table is None:
        base += tl.cast(row, tl.int64) * stride_row + tl.cast(first, tl.int64) * stride_slot
    return base


@triton.jit
def load_block(
    base,  # of `head_of_sequence`
    b,
    slot,
    block_table,
    stride_table,
    pages,
    page_size,
    stride_page,
    stride_row,
    rows,
    columns,
    row_limit,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """`load_tile` of the keys or values from ``slot`` on."""
    offset = block_offset(b, slot, block_table, stride_table, pages, page_size, stride_page, stride_row)
    return load_tile(base + offset, stride_row, rows, columns, row_limit, WIDTH, PADDED)


@triton.jit
def masked(s, tile):
    """Scores with a tile of the user's mask: int8 (0: hidden) or numbers to add."""
    if tile.dtype == tl.int8:
        s += tl.where(tile != 0, 0.0, HIDDEN)
    else:
        s += tile.to(tl.float32)
    return s


@triton.jit
def softcapped(s, SOFTCAP: tl.constexpr):
    """``c tanh(s / c)`` through the exponential, the one transcendental that every vector unit has."""
    if SOFTCAP > 0:
        # From 40 on the quotient is less than float32 can take off the cap. A minimum that propagates NaN is
        # one instruction; the other kind needs a comparison and selections, and memory for them.
        twice = tl.minimum(s * (2 / SOFTCAP), 40.0, propagate_nan=tl.PropagateNan.ALL)
        s = SOFTCAP - 2 * SOFTCAP / (tl.exp(twice) + 1)
    return s


@triton.jit
def online_softmax(s, m, denominator, acc):
    """One step of FlashAttention's recurrence (2205.14135, algorithm 1): weights, the rest rescaled."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp(s - m_new[:, None])
    alpha = tl.exp(m - m_new)
    return p, m_new, denominator * alpha + tl.sum(p, 1), acc * alpha[:, None]


@triton.jit
def normalized(acc, m, denominator, v_scale, kh):
    """(output, lse) at the end of the recurrence; 0 and -inf for a row that saw no key."""
    unseen = denominator == 0.0
    denominator = tl.where(unseen, 1.0, denominator)
    factor = 1.0 / denominator
    if v_scale is not None:
        factor *= tl.load(v_scale + kh)
    return acc * factor[:, None], tl.where(unseen, HIDDEN, m + tl.log(denominator))
