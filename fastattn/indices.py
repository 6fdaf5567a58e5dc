"""The check of an attention call's indices: page tables, lengths and rows.

It reads tensor values, hence synchronises with a device. On a CPU every backend refuses what is out of
range; elsewhere FASTATTN_STRICT asks for this check, and without it backends clamp.
"""

from __future__ import annotations

from torch import Tensor

from .spec import AttentionArgs


def check_indices(a: AttentionArgs) -> None:
    """Raises ValueError naming the first index that points outside q, k or v."""
    _cumulative("cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
    rows = a.k.shape[0] if a.k.ndim == 3 else a.k.shape[1]
    if a.block_table is not None:
        page, max_pages = a.k.shape[1], a.block_table.shape[1]
        _within("cache_seqlens", a.seqused_k, 0, page * max_pages)
        lengths = [] if a.seqused_k is None else a.seqused_k.tolist()
        for b, used in enumerate(lengths):
            _within(f"block_table[{b}]", a.block_table[b, : -(-used // page)], 0, a.k.shape[0] - 1)
    elif a.cu_seqlens_k is not None:
        _cumulative("cu_seqlens_k", a.cu_seqlens_k, rows)
        if a.seqused_k is not None:
            over = a.seqused_k - a.cu_seqlens_k.diff()
            _within("cache_seqlens past its sequence's length by", over, -rows, 0)
    else:
        _within("cache_seqlens", a.seqused_k, 0, rows)
        _within("cache_batch_idx", a.cache_batch_idx, 0, a.k.shape[0] - 1)
    _within("cache_leftpad", a.cache_leftpad, 0, 2**31 - 1)


def _within(name: str, t: Tensor | None, lowest: int, highest: int) -> None:
    if t is None or not t.numel():
        return
    lo, hi = (int(x) for x in t.aminmax())
    if lo < lowest or hi > highest:
        raise ValueError(f"{name}: values {lo}..{hi}, expected {lowest}..{highest}")


def _cumulative(name: str, t: Tensor | None, total: int) -> None:
    if t is None:
        return
    values = t.tolist()
    if values[0] != 0 or values[-1] > total or values != sorted(values):
        raise ValueError(f"{name}: {values}, expected to rise from 0 to at most {total}")
