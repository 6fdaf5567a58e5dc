"""Attention of few queries over a long cache: keys are split over the cores and the parts merged by their
lse.

The queries of all heads that share a KV head are the rows of one matrix, so that the Cube reads each key once
for all of them (GQA packing). Row ``r`` is query ``r // GROUP`` of head ``r % GROUP`` in the KV head's group.
"""

import triton
import triton.language as tl

from .blocks import (
    HIDDEN,
    LOWEST,
    diagonal,
    head_of_sequence,
    key_span,
    load_block,
    load_tile,
    masked,
    normalized,
    online_softmax,
    softcapped,
)


@triton.jit
def decode_kernel(
    q,  # (B, Hkv, rows, D)
    k,
    v,
    part,  # float32 (B, Hkv, splits, rows, Dv)
    part_lse,  # float32 (B, Hkv, splits, rows)
    attn_mask,
    alibi_slopes,
    k_scale,
    v_scale,
    cu_seqlens_k,
    seqused_k,
    cache_leftpad,
    cache_batch_idx,
    q_pos0,
    k_pos0,
    block_table,
    stride_qb,
    stride_qh,
    stride_qr,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_mb,
    stride_mh,
    stride_ab,
    stride_table,
    scale,
    batch,
    kv_heads,
    splits,
    capacity,
    rows_k,
    page_size,
    left,
    right,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One program a core; a piece of work is one split of the keys of one KV head of one sequence."""
    core = tl.program_id(0)
    cores = tl.num_programs(0)
    rows = tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    count: tl.constexpr = QUERIES * GROUP
    for item in range(core, batch * kv_heads * splits, cores):
        split = item % splits
        kh = item // splits % kv_heads
        b = item // (splits * kv_heads)
        cache_row, k_first, start, stop = key_span(
            b, cu_seqlens_k, seqused_k, cache_leftpad, cache_batch_idx, capacity, rows_k
        )
        own = diagonal(b, q_pos0, k_pos0, QUERIES, start, stop)
        lo = tl.maximum(start, own - left)
        hi = tl.minimum(stop, own + QUERIES + right)
        aligned = lo
        if block_table is not None:
            aligned = lo // BLOCK_K * BLOCK_K  # blocks of pages lie on a grid; the first may begin inside one
        blocks = (tl.maximum(hi - aligned, 0) + BLOCK_K - 1) // BLOCK_K
        share = (blocks + splits - 1) // splits
        k_base = head_of_sequence(k, kh, stride_kh, cache_row, stride_kb, k_first, stride_ks, block_table)
        v_base = head_of_sequence(v, kh, stride_vh, cache_row, stride_vb, k_first, stride_vs, block_table)
        score_scale = scale
        if k_scale is not None:
            score_scale = scale * tl.load(k_scale + kh)
        q_tile = load_tile(
            q + tl.cast(b, tl.int64) * stride_qb + kh * stride_qh,
            stride_qr,
            rows,
            d,
            count,
            HEAD_DIM,
            BLOCK_D != HEAD_DIM,
        )
        m = tl.full([BLOCK_R], LOWEST, tl.float32)
        denominator = tl.zeros([BLOCK_R], tl.float32)
        acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
        for n in range(split * share, tl.minimum((split + 1) * share, blocks)):
            slot = tl.maximum(aligned + n * BLOCK_K, lo)
            present = tl.minimum(hi, aligned + (n + 1) * BLOCK_K) - slot
            k_tile = load_block(
                k_base, b, slot, block_table, stride_table, rows_k, page_size, stride_kb, stride_ks, columns,
                d, present, HEAD_DIM, BLOCK_D != HEAD_DIM,
            )  # fmt: skip
            s = softcapped(tl.dot(q_tile, tl.trans(k_tile)) * score_scale, SOFTCAP)
            if alibi_slopes is not None:
                slopes = tl.load(
                    alibi_slopes + b * stride_ab + kh * GROUP + rows % GROUP, mask=rows < count, other=0.0
                )
                distance = (rows // GROUP + (own - slot)).to(tl.float32)[:, None] - columns.to(tl.float32)[
                    None, :
                ]
                s -= slopes[:, None] * tl.abs(distance)
            if attn_mask is not None:  # of one query a head
                mask_rows = attn_mask + tl.cast(b, tl.int64) * stride_mb + slot
                mask_rows += tl.cast(kh * GROUP, tl.int64) * stride_mh
                visible = (rows < count)[:, None] & (columns < present)[None, :]
                tile = tl.load(
                    mask_rows + rows[:, None] * stride_mh + columns[None, :], mask=visible, other=0
                )
                s = masked(s, tile)
            if QUERIES == 1:
                s += tl.where(columns < present, 0.0, HIDDEN)[None, :]
            else:
                row_own = rows // GROUP + (own - slot)
                first = row_own - left
                beyond = tl.minimum(row_own + right + 1, present)
                outside = (columns[None, :] < first[:, None]) | (columns[None, :] >= beyond[:, None])
                s += tl.where(outside, HIDDEN, 0.0)
            p, m, denominator, acc = online_softmax(s, m, denominator, acc)
            v_tile = load_block(
                v_base, b, slot, block_table, stride_table, rows_k, page_size, stride_vb, stride_vs, columns,
                dv, present, V_HEAD_DIM, BLOCK_DV != V_HEAD_DIM,
            )  # fmt: skip
            acc += tl.dot(p.to(v_tile.dtype), v_tile)
        acc, row_lse = normalized(acc, m, denominator, v_scale, kh)
        base = tl.cast(item, tl.int64) * count
        stored = (rows < count)[:, None]
        if BLOCK_DV != V_HEAD_DIM:
            stored = stored & (dv < V_HEAD_DIM)[None, :]
        tl.store(part + (base + rows[:, None]) * V_HEAD_DIM + dv[None, :], acc, mask=stored)
        tl.store(part_lse + base + rows, row_lse, mask=rows < count)


@triton.jit
def combine_kernel(
    part,
    part_lse,
    out,  # (B, Hkv, rows, Dv), contiguous
    lse,  # float32 (B, Hkv, rows)
    sinks,
    pairs,  # of a sequence and a KV head
    kv_heads,
    splits,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The splits of each KV head of each sequence, weighted by their share of the softmax's denominator."""
    dv = tl.arange(0, BLOCK_DV)
    count: tl.constexpr = QUERIES * GROUP
    slices: tl.constexpr = (count + BLOCK_R - 1) // BLOCK_R
    for item in range(tl.program_id(0), pairs * slices, tl.num_programs(0)):
        pair = item // slices
        rows = item % slices * BLOCK_R + tl.arange(0, BLOCK_R)
        stored = (rows < count)[:, None]
        if BLOCK_DV != V_HEAD_DIM:
            stored = stored & (dv < V_HEAD_DIM)[None, :]
        m = tl.full([BLOCK_R], LOWEST, tl.float32)
        denominator = tl.zeros([BLOCK_R], tl.float32)
        if sinks is not None:
            heads = pair % kv_heads * GROUP + rows % GROUP
            m = tl.load(sinks + heads, mask=rows < count, other=0.0).to(tl.float32)
            denominator += 1.0
        acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
        for split in range(splits):
            base = (tl.cast(pair, tl.int64) * splits + split) * count
            weight = tl.load(part_lse + base + rows, mask=rows < count, other=HIDDEN)
            tile = tl.load(part + (base + rows[:, None]) * V_HEAD_DIM + dv[None, :], mask=stored, other=0.0)
            m_new = tl.maximum(m, weight)
            alpha = tl.exp(m - m_new)
            weight = tl.exp(weight - m_new)
            denominator = denominator * alpha + weight
            acc = acc * alpha[:, None] + tile * weight[:, None]
            m = m_new
        acc, row_lse = normalized(acc, m, denominator, None, 0)
        base = tl.cast(pair, tl.int64) * count
        tl.store(
            out + (base + rows[:, None]) * V_HEAD_DIM + dv[None, :], acc.to(out.dtype.element_ty), mask=stored
        )
        if lse is not None:
            tl.store(lse + base + rows, row_lse, mask=rows < count)
