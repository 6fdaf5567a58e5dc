"""The uniform grids that GPTQ checkpoints can hold, and the choice of a group's scale and zero point.

A group of weights shares ``w = scale * (q - zero)`` with q in 0..2^bits - 1, the scale in float16 as it goes
to disk. Symmetric: ``zero = 2^(bits - 1)``. Asymmetric: ``zero`` is any q, so that 0 lies on the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SHRINK = (1.0, 0.3, 36)  # of the range searched: widest, narrowest, candidates
_TINY = 2.0**-24  # the smallest float16 above 0
_LARGEST = torch.finfo(torch.float16).max


class Grid(NamedTuple):
    """``search``: the scale minimizes the weighted squared error; otherwise it spans the largest weight."""

    bits: int
    sym: bool
    search: bool = True

    @property
    def top(self) -> int:
        """The largest q."""
        return 2**self.bits - 1


class Params(NamedTuple):
    """Scale and zero point of a group, (out,) each; the scale is a float16 value."""

    scale: Tensor
    zero: Tensor


def round_to(w: Tensor, p: Params, grid: Grid) -> Tensor:
    """The nearest q of each weight (..., out), in the weights' dtype."""
    return w.div(p.scale).round_().add_(p.zero).clamp_(0, grid.top)


def value(q: Tensor, p: Params) -> Tensor:
    """The weights that q stands for: exact in float32, since q has at most 8 bits and a scale 11."""
    return (q - p.zero) * p.scale


def fit(w: Tensor, grid: Grid, importance: Tensor) -> Params:
    """Scale and zero point of a group ``w`` (columns, out), out groups at once.

    With ``grid.search``, of scales that span 30 to 100 % of the group's range the one that minimizes
    ``sum_j importance[j] (w_j - value(round_to(w_j)))^2``. A symmetric grid reaches one step further below
    zero than above: the search also tries negative scales, which turn that around.

    Raises ValueError when a weight is not finite or beyond what a float16 scale can span.
    """
    low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
    best = _span(low, high, 1.0, grid)
    if not grid.search:
        return best
    least = _error(w, best, grid, importance)
    for i in range(_SHRINK[2]):
        ratio = _SHRINK[0] + (_SHRINK[1] - _SHRINK[0]) * i / (_SHRINK[2] - 1)
        for sign in (1, -1) if grid.sym else (1,):
            tried = _span(low, high, sign * ratio, grid)
            error = _error(w, tried, grid, importance)
            better = error < least
            least = torch.where(better, error, least)
            best = Params(*(torch.where(better, t, b) for t, b in zip(tried, best, strict=True)))
    return best


def _span(low: Tensor, high: Tensor, ratio: float, grid: Grid) -> Params:
    """The grid over ``ratio`` of the range [low, high], which holds 0."""
    width = 2 * torch.maximum(high, -low) if grid.sym else high - low
    scale = width / grid.top * ratio
    if not bool((scale.abs() <= _LARGEST).all()):  # NaN is not
        raise ValueError(f"weight: a group spans {float(width.max()):g}, beyond float16 scales")
    # A group of zeros, or of weights below every float16, still needs a grid.
    scale = torch.where(scale.abs() < _TINY, _TINY, scale).half().to(low.dtype)
    if grid.sym:
        return Params(scale, torch.full_like(scale, (grid.top + 1) / 2))
    return Params(scale, (-low * ratio / scale).round().clamp(0, grid.top))


def _error(w: Tensor, p: Params, grid: Grid, importance: Tensor) -> Tensor:
    return importance @ (value(round_to(w, p, grid), p) - w).square_()
