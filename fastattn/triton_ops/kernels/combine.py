"""Merging the pieces of split-KV attention (Flash-Decoding)."""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import LN2, LOG2E, NEGATIVE_INFINITY
from .spans import query_span


@triton.jit(do_not_specialize=["max_q", "total_q", "part_split", "part_lse_split"])
def combine_kernel(
    part, part_lse,  # float32 (splits, batch, row, head, V_HEAD_DIM) and (splits, batch, head, row)
    out, lse, sinks, cu_q,
    max_q, total_q,
    part_split, part_batch, part_row, part_head, part_lse_split, part_lse_batch, part_lse_head,
    out_batch, out_row, out_head, lse_batch, lse_head,
    HEADS: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merges the pieces of one query and head by their log-sum-exp; a sink enters once, here."""
    pid = tl.program_id(0)
    head = pid % HEADS
    i = pid // HEADS % max_q
    b = pid // HEADS // max_q
    q_first, q_len = query_span(cu_q, b, max_q, total_q)
    if i >= q_len:
        return
    batch = b.to(tl.int64)
    at = (q_first + i).to(tl.int64)
    piece = tl.arange(0, BLOCK_SPLITS)
    there = piece < SPLITS
    dv = tl.arange(0, BLOCK_DV)
    pieces = piece.to(tl.int64)
    lse_at = part_lse + pieces * part_lse_split + batch * part_lse_batch + head * part_lse_head + at
    parts = tl.load(lse_at, mask=there, other=NEGATIVE_INFINITY)
    peak = tl.max(parts, 0)
    if sinks is not None:
        sink = tl.load(sinks + head)
        peak = tl.maximum(peak, sink)
    shift = tl.where(peak == NEGATIVE_INFINITY, 0.0, peak)
    weight = tl.exp2((parts - shift) * LOG2E)
    total = tl.sum(weight, 0)
    if sinks is not None:
        total += tl.exp2((sink - shift) * LOG2E)
    part_at = part + pieces * part_split + batch * part_batch + at * part_row + head * part_head
    inside = there[:, None] & (dv < V_HEAD_DIM)[None, :]
    values = tl.load(part_at[:, None] + dv[None, :], mask=inside, other=0.0)
    divisor = tl.where(total == 0.0, 1.0, total)
    merged = tl.sum(values * weight[:, None], 0) / divisor
    out_at = out + batch * out_batch + at * out_row + head * out_head + dv
    tl.store(out_at, merged.to(out.dtype.element_ty), mask=dv < V_HEAD_DIM)
    if lse is not None:
        value = tl.where(total == 0.0, NEGATIVE_INFINITY, shift + tl.log2(divisor) * LN2)
        tl.store(lse + batch * lse_batch + head * lse_head + at, value)
