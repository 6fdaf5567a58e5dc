"""Attention: prefill or decode, by the number of query rows that share keys and values."""

from __future__ import annotations

from torch import Tensor

from .attention_params import AttentionCall
from .decode import ROWS, decode
from .prefill import FEATURES, HEAD_DIMS, PREFILL, prefill


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse), as `decode` and `prefill` return them.

    Decode, which packs the query heads of a KV group into the rows of one tile, takes calls whose rows fit
    one: it then reads each key and value once. Raises ValueError for what the kernels cannot take.
    """
    rows = call.longest_q * (call.q.shape[-2] // max(call.k.shape[-2], 1))  # `prefill` refuses 0 heads
    return decode(call) if rows <= ROWS else prefill(call)


def widest_head_dim(shared_bytes: int) -> int:
    """The widest head_dim for which blocks of every prefill kernel fit this much shared memory; decode's are
    all smaller than 48 KB.
    """
    needs = {d: max(PREFILL[d, features].shared_bytes for features in FEATURES) for d in HEAD_DIMS}
    return max(d for d in HEAD_DIMS if all(needs[n] <= shared_bytes for n in HEAD_DIMS if n <= d))
