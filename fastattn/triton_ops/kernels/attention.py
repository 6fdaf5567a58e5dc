"""The attention kernel: FlashAttention-2 (Dao 2023, algorithm 1) over any layout of keys and values.

One text serves prefill and decode. A program takes ``BLOCK_M`` rows of one sequence and walks the keys that
any of them sees in blocks of ``BLOCK_N``. ``PACK`` query heads of a KV head share a program as neighbouring
rows (row r is query ``r // PACK`` of head ``r % PACK``), so decode reads each key once for all of them. With
``SPLITS`` > 1 a sequence's keys are cut into as many pieces, whose results `combine.combine_kernel` merges
(Flash-Decoding).

The keys of a block of rows are walked in three phases: blocks at the window's left edge, blocks that every
row sees whole, and blocks at the right edge or the end of the keys. Only the outer two compute visibility.
With ``SPECIALIZE`` (Hopper: one warpgroup loads, two multiply, as FlashAttention-3 has it) all are one phase
that does: Triton 3.6 specializes the warps of a single loop only, and of nothing that loads by pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import LN2, LOG2E, NEGATIVE_INFINITY, clamp, tanh
from .spans import diagonal, key_span, query_span

# Positions are compared as int32; a window or offset past this is as good as unbounded.
FAR = tl.constexpr(1 << 30)


@triton.jit(
    do_not_specialize=[
        "left",
        "right",
        "max_q",
        "total_q",
        "kv_rows",
        "kv_len",
        "max_pages",
        "out_split",
        "lse_split",
    ]
)
def attention_kernel(
    q,  # with SPECIALIZE a tensor descriptor (row, head and dimension)
    k, v,  # with TMA tensor descriptors (sequence or page, key, head, dimension)
    out, lse,  # with SPLITS: float32, a piece each
    alibi_slopes, sinks, mask, cu_q, cu_k, block_table, used, kv_row, leftpad, q_pos0, k_pos0,
    k_scale, v_scale,
    scale, softcap, left, right,
    max_q, total_q,  # queries of a sequence at most; rows of q
    kv_rows, kv_len,  # rows or pages of k; keys a row holds, or packed keys, or those of all pages of a table
    max_pages,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,  # strides
    out_split, out_batch, out_row, out_head, lse_split, lse_batch, lse_head,
    mask_batch, mask_head, mask_row, mask_key, alibi_batch,
    HEADS: tl.constexpr, GROUP: tl.constexpr,  # query heads; of them, those that share a KV head
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr,  # keys a page; 0: not paged
    LEFT: tl.constexpr, RIGHT: tl.constexpr,  # whether the window ends on that side
    SOFTCAP: tl.constexpr,
    SIGNED: tl.constexpr,  # the scale may be negative or zero
    PRECISION: tl.constexpr,  # of float32 products: "ieee", "tf32x3", "tf32"
    TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
    ABSENT: tl.constexpr,  # k and v may hold rows past a sequence's last key: of others, or never written
    SPLITS: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    BIASED: tl.constexpr = SOFTCAP or SIGNED or alibi_slopes is not None or mask is not None
    pid = tl.program_id(0)
    blocks = tl.cdiv(max_q * PACK, BLOCK_M)
    block = pid % blocks
    if RIGHT:
        block = blocks - 1 - block  # those that see most keys first
    pid = pid // blocks
    split = pid % SPLITS
    pid = pid // SPLITS
    first_head = pid % (HEADS // PACK) * PACK
    kv_head = first_head // GROUP
    b = pid // (HEADS // PACK)

    q_first, q_len = query_span(cu_q, b, max_q, total_q)
    if cu_q is not None and block * BLOCK_M >= q_len * PACK:
        return
    key_first, k_len, storage_first = key_span(cu_k, used, leftpad, b, kv_len)
    offset = diagonal(q_pos0, k_pos0, b, q_len, k_len)
    # Key j is visible to query i iff i + lowest <= j <= i + highest.
    lowest = clamp(offset - left, -FAR, FAR).to(tl.int32)
    highest = clamp(offset + right, -FAR, FAR).to(tl.int32)
    distance = clamp(offset, -FAR, FAR).to(tl.int32)

    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = r // PACK
    head = (first_head + r % PACK).to(tl.int64)
    live = i < q_len
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    batch = b.to(tl.int64)
    if SPECIALIZE:
        q_tile = q.load([b * max_q + block * BLOCK_M, first_head * HEAD_DIM])
    else:
        q_at = q + batch * q_batch + (q_first + i).to(tl.int64) * q_row + head * q_head
        q_there = live[:, None] & (d < HEAD_DIM)[None, :]
        q_tile = tl.load(q_at[:, None] + d[None, :], mask=q_there, other=0.0)

    if kv_row is not None:
        row = clamp(tl.load(kv_row + b), 0, kv_rows - 1)
    elif cu_k is not None:
        row = 0
    else:
        row = b
    if not TMA:
        k_at = k + kv_head.to(tl.int64) * k_head
        v_at = v + kv_head.to(tl.int64) * v_head
        if PAGE == 0:
            k_at += row.to(tl.int64) * k_batch if cu_k is None else 0
            v_at += row.to(tl.int64) * v_batch if cu_k is None else 0
    factor = scale * LOG2E
    if k_scale is not None:
        factor *= tl.load(k_scale + kv_head)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + batch * alibi_batch + head) * LOG2E
    if mask is not None:
        mask_at = mask + batch * mask_batch + head * mask_head + i.to(tl.int64) * mask_row

    # Ends of the phases.
    i_first = block * BLOCK_M // PACK
    i_last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // PACK, q_len - 1)
    begin, end = 0, k_len
    whole_begin, whole_end = 0, k_len
    if LEFT:
        begin = tl.maximum(i_first + lowest, 0) // BLOCK_N * BLOCK_N
        whole_begin = tl.cdiv(tl.maximum(i_last + lowest, 0), BLOCK_N) * BLOCK_N
    if RIGHT:
        end = clamp(i_last + highest + 1, 0, k_len)
        whole_end = clamp(i_first + highest + 1, 0, k_len)
    whole_end = whole_end // BLOCK_N * BLOCK_N
    if SPLITS > 1:
        piece = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), SPLITS) * BLOCK_N
        begin += split * piece
        end = tl.minimum(end, begin + piece)
    whole_begin = clamp(whole_begin, begin, tl.maximum(end, begin))
    whole_end = clamp(whole_end, whole_begin, tl.maximum(end, whole_begin))

    peak = tl.full([BLOCK_M], NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for phase in tl.static_range(2 if SPECIALIZE else 0 if LEFT else 1, 3):
        if phase == 0:
            start, stop = begin, whole_begin
        elif phase == 1:
            start, stop = whole_begin, whole_end
        elif SPECIALIZE:
            start, stop = begin, end
        else:
            start, stop = whole_end, end
        for j0 in tl.range(start, stop, BLOCK_N, warp_specialize=SPECIALIZE):
            j = j0 + tl.arange(0, BLOCK_N)
            # ------------------------------------------------------------------ keys and scores
            if TMA:
                if PAGE > 0:
                    page = clamp(
                        tl.load(block_table + batch * max_pages + (storage_first + j0) // PAGE),
                        0,
                        kv_rows - 1,
                    )
                    tile = [page, (storage_first + j0) % PAGE, kv_head, 0]
                else:
                    tile = [row, key_first + j0, kv_head, 0]
                k_tile = k.load(tile).reshape(BLOCK_N, BLOCK_D)
            else:
                there = j < k_len if phase != 1 else j >= 0
                if PAGE > 0:
                    at = storage_first + j
                    page = tl.load(block_table + batch * max_pages + at // PAGE, mask=there, other=0)
                    page = clamp(page, 0, kv_rows - 1).to(tl.int64)
                    k_rows = page * k_batch + at % PAGE * k_row
                    v_rows = page * v_batch + at % PAGE * v_row
                else:
                    k_rows = (key_first + j).to(tl.int64) * k_row
                    v_rows = (key_first + j).to(tl.int64) * v_row
                if phase != 1:
                    k_there = there[:, None] & (d < HEAD_DIM)[None, :]
                    k_tile = tl.load(k_at + k_rows[:, None] + d[None, :], mask=k_there, other=0.0)
                elif BLOCK_D != HEAD_DIM:
                    k_tile = tl.load(
                        k_at + k_rows[:, None] + d[None, :], mask=(d < HEAD_DIM)[None, :], other=0.0
                    )
                else:
                    k_tile = tl.load(k_at + k_rows[:, None] + d[None, :])
            s = tl.dot(q_tile, k_tile.to(q_tile.dtype).T, input_precision=PRECISION)
            # In units of log2: exp2 is the instruction that the hardware has.
            if BIASED:
                if SOFTCAP:
                    s = softcap * LOG2E * tanh(s * (factor / LOG2E / softcap))
                else:
                    s = s * factor
                if alibi_slopes is not None:
                    s -= slope[:, None] * tl.abs(distance + i[:, None] - j[None, :]).to(tl.float32)
                if mask is not None:
                    column = (storage_first + j).to(tl.int64) * mask_key
                    inside = live[:, None] & (j < k_len)[None, :]
                    given = tl.load(mask_at[:, None] + column[None, :], mask=inside, other=0)
                    if mask.dtype.element_ty == tl.uint8:
                        s = tl.where(given != 0, s, NEGATIVE_INFINITY)
                    else:
                        s += given.to(tl.float32) * LOG2E
                unit = 1.0
            else:
                unit = factor
            if phase != 1:
                visible = (j < k_len)[None, :]
                if LEFT:
                    visible = visible & (j[None, :] - i[:, None] >= lowest)
                if RIGHT:
                    visible = visible & (j[None, :] - i[:, None] <= highest)
                s = tl.where(visible, s, NEGATIVE_INFINITY)
            # ------------------------------------------------------------------ online softmax
            new_peak = tl.maximum(peak, tl.max(s, 1) * unit)
            shift = (
                tl.where(new_peak == NEGATIVE_INFINITY, 0.0, new_peak) if phase != 1 or BIASED else new_peak
            )
            p = tl.exp2(s * unit - shift[:, None])
            decay = tl.exp2(peak - shift)
            total = total * decay + tl.sum(p, 1)
            peak = new_peak
            # ------------------------------------------------------------------ values
            if TMA:
                v_tile = v.load(tile).reshape(BLOCK_N, BLOCK_DV)
                if ABSENT and phase != 1:  # a weight of 0 would not silence NaN
                    v_tile = tl.where((j < k_len)[:, None], v_tile, 0.0)
            elif phase != 1:
                v_there = there[:, None] & (dv < V_HEAD_DIM)[None, :]
                v_tile = tl.load(v_at + v_rows[:, None] + dv[None, :], mask=v_there, other=0.0)
            elif BLOCK_DV != V_HEAD_DIM:
                v_tile = tl.load(
                    v_at + v_rows[:, None] + dv[None, :], mask=(dv < V_HEAD_DIM)[None, :], other=0.0
                )
            else:
                v_tile = tl.load(v_at + v_rows[:, None] + dv[None, :])
            acc = acc * decay[:, None]
            acc = tl.dot(p.to(q_tile.dtype), v_tile.to(q_tile.dtype), acc, input_precision=PRECISION)

    if SPLITS == 1 and sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        new_peak = tl.maximum(peak, sink)
        shift = tl.where(new_peak == NEGATIVE_INFINITY, 0.0, new_peak)
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.exp2(sink - shift)
        acc = acc * decay[:, None]
        peak = shift
    divisor = tl.where(total == 0.0, 1.0, total)
    acc = acc / divisor[:, None]
    if v_scale is not None:
        acc *= tl.load(v_scale + kv_head)
    at = (q_first + i).to(tl.int64)
    out_at = out + split.to(tl.int64) * out_split + batch * out_batch + at * out_row + head * out_head
    tl.store(
        out_at[:, None] + dv[None, :],
        acc.to(out.dtype.element_ty),
        mask=live[:, None] & (dv < V_HEAD_DIM)[None, :],
    )
    if lse is not None:
        value = tl.where(total == 0.0, NEGATIVE_INFINITY, (peak + tl.log2(divisor)) * LN2)
        lse_at = lse + split.to(tl.int64) * lse_split + batch * lse_batch + head * lse_head + at
        tl.store(lse_at, value, mask=live)
