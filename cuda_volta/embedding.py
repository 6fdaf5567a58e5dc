"""Rows of an embedding matrix."""

from __future__ import annotations

from torch import Tensor

from .weights import GroupedWeight, dequantize


def embedding(ids: Tensor, w: GroupedWeight | Tensor) -> Tensor:
    """Rows ``ids`` int64 (N,) of W (out, in), float16 (N, in); an id outside W is taken as the nearest."""
    if isinstance(w, Tensor):
        return w.index_select(0, ids.clamp(0, w.shape[0] - 1)).half()
    return dequantize(w, ids=ids)
