"""The attention calls whose kernels are modelled, and how much their blocks do at the length claimed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from cuda_volta.attention_params import AttentionCall

SEQLEN = 8192  # of the speeds claimed
WINDOW = 1024
FOLLOWED = 1024, 2048  # lengths of which a block is followed
_PAGE = 256
HEADS, BATCH = 2, 1


class Case(NamedTuple):
    """One kind of call. ``call(seqlen, head_dim)`` makes it, its tensors' contents unset but for indices."""

    name: str
    call: Callable[[int, int], AttentionCall]
    visible: Callable[
        [int, int, int], int
    ]  # (first query, queries of a block, seqlen) -> keys a block passes
    pairs: Callable[[int], int]  # seqlen -> query-key pairs that count


def _half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16)


def _plain(seqlen: int, head_dim: int) -> AttentionCall:
    q, k, v = (_half(BATCH, seqlen, HEADS, head_dim) for _ in range(3))
    return AttentionCall(q, k, v, head_dim**-0.5)


def _causal(seqlen: int, head_dim: int) -> AttentionCall:
    return _plain(seqlen, head_dim)._replace(causal=True)


def _window(seqlen: int, head_dim: int) -> AttentionCall:
    return _plain(seqlen, head_dim)._replace(causal=True, window=(WINDOW - 1, 0))


def _softcap(seqlen: int, head_dim: int) -> AttentionCall:
    return _plain(seqlen, head_dim)._replace(softcap=30.0)


def _alibi(seqlen: int, head_dim: int) -> AttentionCall:
    return _causal(seqlen, head_dim)._replace(alibi_slopes=torch.ones(HEADS))


def _varlen(seqlen: int, head_dim: int) -> AttentionCall:
    q, k, v = (_half(2 * seqlen, HEADS, head_dim) for _ in range(3))
    bounds = torch.tensor([0, seqlen, 2 * seqlen], dtype=torch.int32)
    return AttentionCall(
        q,
        k,
        v,
        head_dim**-0.5,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=seqlen,
        max_seqlen_k=seqlen,
    )


def _paged(seqlen: int, head_dim: int) -> AttentionCall:
    pages = seqlen // _PAGE
    k, v = (_half(pages, _PAGE, HEADS, head_dim) for _ in range(2))
    table = torch.arange(pages - 1, -1, -1, dtype=torch.int32)[None]
    used = torch.tensor([seqlen], dtype=torch.int32)
    return AttentionCall(
        _half(BATCH, seqlen, HEADS, head_dim), k, v, head_dim**-0.5, block_table=table, seqused_k=used
    )


def _all_keys(first: int, queries: int, seqlen: int) -> int:
    return seqlen


def _keys_before(first: int, queries: int, seqlen: int) -> int:
    return min(seqlen, first + queries)


def _keys_in_window(first: int, queries: int, seqlen: int) -> int:
    return min(seqlen, first + queries) - max(0, first - WINDOW + 1)


CASES = (
    Case("plain", _plain, _all_keys, lambda s: s * s),
    Case("causal", _causal, _keys_before, lambda s: s * (s + 1) // 2),
    Case("window", _window, _keys_in_window, lambda s: WINDOW * s - WINDOW * (WINDOW - 1) // 2),
    Case("softcap", _softcap, _all_keys, lambda s: s * s),
    Case("alibi", _alibi, _keys_before, lambda s: s * (s + 1) // 2),
    Case("varlen", _varlen, _all_keys, lambda s: s * s),
    Case("paged", _paged, _all_keys, lambda s: s * s),
)
