"""Attention of many queries: two-level tiling on a persistent grid, masks only where a band's edge passes.

First level: BLOCK_K keys cross from Cube to Vector and back at a time, so that the two meet rarely. Second
level: the vendor's compiler cuts each matmul into L0A, L0B and L0C tiles and each vector step into row slices
of the Unified Buffer. A tile of queries runs over two kinds of keys in loops of their own:

- *full* blocks, seen by all of its rows: BLOCK_K keys, no mask;
- *edge* blocks, where the band's edge or the last key passes, or all blocks when the call has a mask or
  ALiBi: EDGE_K keys. Their mask is a window of one small matrix (`tiling_mask`), shifted to where the edge
  passes.
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
    query_span,
    softcapped,
)


@triton.jit
def prefill_kernel(
    q,
    k,
    v,
    out,
    lse,  # (H, total) or (B, H, Sq)
    band,  # the tiling-mask
    attn_mask,
    alibi_slopes,
    sinks,
    k_scale,
    v_scale,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    cache_leftpad,
    cache_batch_idx,
    q_pos0,
    k_pos0,
    block_table,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_lb,
    stride_lh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_ab,
    stride_table,
    scale,
    batch,
    heads,
    group,
    seqlen_q,
    total_q,
    capacity,
    rows_k,
    page_size,
    left,
    right,
    band_stride,
    band_origin,
    band_skip,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGE_K: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One program a core. Query tiles run from the last, longest under causality, to the first; the cores
    take them forwards and backwards in turn, which evens out what the lengths differ by."""
    core = tl.program_id(0)
    cores = tl.num_programs(0)
    tiles = (seqlen_q + BLOCK_Q - 1) // BLOCK_Q
    work = tiles * batch * heads
    rounds = work // cores
    last_core = tl.where(rounds % 2 == 0, core, cores - 1 - core)
    rounds += (last_core < work - rounds * cores).to(tl.int32)

    rows = tl.arange(0, BLOCK_Q)
    columns = tl.arange(0, BLOCK_K)
    edge_columns = tl.arange(0, EDGE_K)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for turn in range(rounds):
        item = turn * cores + tl.where(turn % 2 == 0, core, cores - 1 - core)
        h = item % heads
        b = item // heads % batch
        q0 = (tiles - 1 - item // (heads * batch)) * BLOCK_Q

        q_first, queries = query_span(b, cu_seqlens_q, seqlen_q, total_q)
        cache_row, k_first, start, stop = key_span(
            b, cu_seqlens_k, seqused_k, cache_leftpad, cache_batch_idx, capacity, rows_k
        )
        own = diagonal(b, q_pos0, k_pos0, queries, start, stop) + q0
        q_batch = b
        if cu_seqlens_q is not None:
            q_batch = 0
        q_row = tl.cast(q_first + q0, tl.int64)
        # Of this tile when below BLOCK_Q; not positive past the end of a short sequence.
        q_rows = queries - q0
        kh = h // group
        k_base = head_of_sequence(k, kh, stride_kh, cache_row, stride_kb, k_first, stride_ks, block_table)
        v_base = head_of_sequence(v, kh, stride_vh, cache_row, stride_vb, k_first, stride_vs, block_table)

        # Slots that some row sees, [lo, hi), and that all rows see, [all_lo, all_hi).
        last = tl.minimum(q_rows, BLOCK_Q) - 1
        lo = start
        hi = tl.where(q_rows > 0, stop, start)
        all_lo = start
        all_hi = stop
        if band is not None:
            lo = tl.maximum(start, own - left)
            hi = tl.minimum(hi, own + last + right + 1)
            all_lo = tl.maximum(start, own + last - left)
            all_hi = tl.minimum(stop, own + right + 1)
        origin = lo
        if block_table is not None:
            origin = lo // EDGE_K * EDGE_K  # blocks of pages lie on a grid; the first may begin inside one
        before = 0
        full = 0
        if (attn_mask is None) and (alibi_slopes is None):
            before = (tl.maximum(all_lo - origin, 0) + EDGE_K - 1) // EDGE_K
            full = tl.maximum(tl.minimum(all_hi, hi) - (origin + before * EDGE_K), 0) // BLOCK_K
        full_lo = origin + before * EDGE_K
        skipped = full * BLOCK_K
        edges = (tl.maximum(hi - origin - skipped, 0) + EDGE_K - 1) // EDGE_K

        score_scale = scale
        if k_scale is not None:
            score_scale = scale * tl.load(k_scale + kh)
        q_tile = load_tile(
            q + tl.cast(q_batch, tl.int64) * stride_qb + q_row * stride_qs + tl.cast(h, tl.int64) * stride_qh,
            stride_qs,
            rows,
            d,
            q_rows,
            HEAD_DIM,
            BLOCK_D != HEAD_DIM,
        )
        m = tl.full([BLOCK_Q], LOWEST, tl.float32)
        denominator = tl.zeros([BLOCK_Q], tl.float32)
        acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)

        if (attn_mask is None) and (alibi_slopes is None):
            for n in range(full):
                slot = full_lo + n * BLOCK_K
                k_tile = load_block(
                    k_base, b, slot, block_table, stride_table, rows_k, page_size, stride_kb, stride_ks,
                    columns, d, BLOCK_K, HEAD_DIM, BLOCK_D != HEAD_DIM,
                )  # fmt: skip
                s = softcapped(tl.dot(q_tile, tl.trans(k_tile)) * score_scale, SOFTCAP)
                p, m, denominator, acc = online_softmax(s, m, denominator, acc)
                v_tile = load_block(
                    v_base, b, slot, block_table, stride_table, rows_k, page_size, stride_vb, stride_vs,
                    columns, dv, BLOCK_K, V_HEAD_DIM, BLOCK_DV != V_HEAD_DIM,
                )  # fmt: skip
                acc += tl.dot(p.to(v_tile.dtype), v_tile)

        for n in range(edges):
            block = origin + n * EDGE_K + tl.where(n >= before, skipped, 0)
            slot = tl.maximum(block, lo)
            present = tl.minimum(stop, block + EDGE_K) - slot
            k_tile = load_block(
                k_base, b, slot, block_table, stride_table, rows_k, page_size, stride_kb, stride_ks,
                edge_columns, d, present, HEAD_DIM, BLOCK_D != HEAD_DIM,
            )  # fmt: skip
            s = softcapped(tl.dot(q_tile, tl.trans(k_tile)) * score_scale, SOFTCAP)
            if alibi_slopes is not None:
                slope = tl.load(alibi_slopes + b * stride_ab + h)
                distance = (rows + (own - slot)).to(tl.float32)[:, None] - edge_columns.to(tl.float32)[
                    None, :
                ]
                s -= slope * tl.abs(distance)
            if band is not None:
                # How far row 0 sees past the block's first key; both edges of a wide band are one picture.
                reach = own + right - slot
                reach = tl.maximum(tl.minimum(reach, EDGE_K - 1), reach - band_skip)
                reach = tl.minimum(tl.maximum(reach, -BLOCK_Q), band_origin)
                window = rows[:, None] * band_stride + edge_columns[None, :]
                s += tl.load(band + (band_origin - reach) + window)
            if attn_mask is not None:
                visible = (rows < q_rows)[:, None] & (edge_columns < present)[None, :]
                mask_rows = attn_mask + tl.cast(b, tl.int64) * stride_mb + tl.cast(h, tl.int64) * stride_mh
                mask_rows += tl.cast(q0, tl.int64) * stride_mq + slot
                tile = tl.load(
                    mask_rows + rows[:, None] * stride_mq + edge_columns[None, :], mask=visible, other=0
                )
                s = masked(s, tile)
            s += tl.where(edge_columns < present, 0.0, HIDDEN)[None, :]
            p, m, denominator, acc = online_softmax(s, m, denominator, acc)
            v_tile = load_block(
                v_base, b, slot, block_table, stride_table, rows_k, page_size, stride_vb, stride_vs,
                edge_columns, dv, present, V_HEAD_DIM, BLOCK_DV != V_HEAD_DIM,
            )  # fmt: skip
            acc += tl.dot(p.to(v_tile.dtype), v_tile)

        if sinks is not None:
            sink = tl.load(sinks + h).to(tl.float32)
            m_new = tl.maximum(m, sink)
            rescale = tl.exp(m - m_new)
            denominator = denominator * rescale + tl.exp(sink - m_new)
            acc *= rescale[:, None]
            m = m_new
        acc, row_lse = normalized(acc, m, denominator, v_scale, kh)
        o_row = out + tl.cast(q_batch, tl.int64) * stride_ob + q_row * stride_os + h * stride_oh
        stored = (rows < q_rows)[:, None]
        if BLOCK_DV != V_HEAD_DIM:
            stored = stored & (dv < V_HEAD_DIM)[None, :]
        tl.store(o_row + rows[:, None] * stride_os + dv[None, :], acc.to(out.dtype.element_ty), mask=stored)
        if lse is not None:
            l_row = lse + q_batch * stride_lb + h * stride_lh + q_row
            tl.store(l_row + rows, row_lse, mask=rows < q_rows)
