"""Linear layers of which each rank holds a piece."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import linear
from ..quant.packed import concat_out
from ..spec import PackedWeight


class ColumnLinear:
    """This rank's rows of one matrix, or of several that read the same input (q, k, v; gate, up).

    Several become one matrix, so one kernel call, when their formats agree; otherwise they run one after
    another and their outputs are concatenated. Their biases, cut alike, are added here. No communication.
    """

    def __init__(self, *weights: PackedWeight, act: str = "") -> None:
        """``act``: see `ops.linear`."""
        if not weights:
            raise ValueError("weights: none, expected at least one")
        inputs = {w.shape[1] for w in weights}
        if len(inputs) > 1:
            raise ValueError(f"weights: inputs of {sorted(inputs)} columns, expected the same input for all")
        self.widths = tuple(w.shape[0] for w in weights)
        self.weights, self.act = _fused(weights), act

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) to (N, sum(widths)) of x's dtype; ``y.split(layer.widths, -1)`` parts it."""
        if len(self.weights) == 1:
            return linear(x, self.weights[0], act=self.act)
        return torch.cat([linear(x, w, act=self.act) for w in self.weights], dim=-1)


class RowLinear:
    """This rank's columns of a matrix; its input is this rank's slice.

    Calling it gives the *partial* result, which a `spec.SyncPolicy` sums over the ranks. ``bias``, whole on
    every rank, is not part of it: it belongs into the `spec.Epilogue`, which adds it once.
    """

    def __init__(self, weight: PackedWeight, act: str = "") -> None:
        """``act``: see `ops.linear`."""
        self.bias, self.act = weight.bias, act
        self.weight = weight._replace(bias=None)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in of this rank) to this rank's unsummed part of (N, out), in x's dtype."""
        return linear(x, self.weight, act=self.act)


def _fused(weights: tuple[PackedWeight, ...]) -> tuple[PackedWeight, ...]:
    if len(weights) == 1:
        return weights
    try:
        return (concat_out(list(weights)),)
    except ValueError:  # their formats differ
        return weights
