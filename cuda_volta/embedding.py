"""Rows of an embedding matrix."""

from __future__ import annotations

from torch import Tensor

from .weights import GroupedWeight, dequantize


def embedding(ids: Tensor, w: GroupedWeight) -> Tensor:
    """Rows ``ids`` int64 (N,) of W (out, in), float16 (N, in); an id outside W is taken as the nearest."""
    return dequantize(w, ids=ids)
