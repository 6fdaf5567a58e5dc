"""Attention: prefill or decode, by the number of query rows that share keys and values."""

from __future__ import annotations

from torch import Tensor

from .attention_params import AttentionCall
from .decode import decode


def attention(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse), as `decode` returns them. Raises ValueError for what the kernels cannot take."""
    return decode(call)
