"""Indices of a call: page tables, lengths, rows, and when their values may be read.

On a CPU every backend refuses what is out of range. Elsewhere reading values synchronises with the device:
FASTATTN_STRICT asks for it, and without it backends clamp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .settings import settings
from .spec import AttentionArgs


def readable(t: Tensor) -> bool:
    """Whether to check values: those on the host, with FASTATTN_STRICT all; none while tracing."""
    return not torch.compiler.is_compiling() and (t.is_cpu or settings.strict)


def as_int32(name: str, t: Tensor) -> Tensor:
    """``t`` in int32. Raises ValueError for another kind of number, or one that int32 does not have."""
    if t.dtype == torch.int32:
        return t
    if t.dtype != torch.int64:
        raise ValueError(f"{name}: {t.dtype}, expected int32")
    if readable(t):
        within(name, t, -(2**31), 2**31 - 1)
    return t.to(torch.int32)


def per_sequence(name: str, value: Tensor | int | None, batch: int, device: torch.device) -> Tensor | None:
    """``value``; a number becomes int32 (batch,) of it. Raises ValueError for one that is no index."""
    if not isinstance(value, int):
        return value
    if not 0 <= value < 2**31:
        raise ValueError(f"{name}: {value}, expected 0..{2**31 - 1}")
    return torch.full((batch,), value, dtype=torch.int32, device=device)


def within(name: str, t: Tensor | None, lowest: int, highest: int) -> None:
    """Raises ValueError naming the range of ``t`` when that is not within ``lowest..highest``."""
    if t is None or not t.numel():
        return
    lo, hi = (int(x) for x in t.aminmax())
    if lo < lowest or hi > highest:
        raise ValueError(f"{name}: values {lo}..{hi}, expected {lowest}..{highest}")


def check_indices(a: AttentionArgs) -> None:
    """Raises ValueError naming the first index that points outside q, k or v."""
    _cumulative("cu_seqlens_q", a.cu_seqlens_q, a.q.shape[0])
    rows = a.k.shape[0] if a.k.ndim == 3 else a.k.shape[1]
    if a.block_table is not None:
        page, max_pages = a.k.shape[1], a.block_table.shape[1]
        within("cache_seqlens", a.seqused_k, 0, page * max_pages)
        lengths = [] if a.seqused_k is None else a.seqused_k.tolist()
        for b, used in enumerate(lengths):
            within(f"block_table[{b}]", a.block_table[b, : -(-used // page)], 0, a.k.shape[0] - 1)
    elif a.cu_seqlens_k is not None:
        _cumulative("cu_seqlens_k", a.cu_seqlens_k, rows)
        if a.seqused_k is not None:
            over = a.seqused_k - a.cu_seqlens_k.diff()
            within("cache_seqlens past its sequence's length by", over, -rows, 0)
    else:
        within("cache_seqlens", a.seqused_k, 0, rows)
        within("cache_batch_idx", a.cache_batch_idx, 0, a.k.shape[0] - 1)
    # Padding may reach past the keys in use: such a sequence has none.
    within("cache_leftpad", a.cache_leftpad, 0, 2**31 - 1)


def _cumulative(name: str, t: Tensor | None, total: int) -> None:
    if t is None:
        return
    values = t.tolist()
    if values[0] != 0 or values[-1] > total or values != sorted(values):
        raise ValueError(f"{name}: {values}, expected to rise from 0 to at most {total}")
