"""Which rows or columns of a stored matrix a `Cut` selects."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..spec import Cut

Matrix = TypeVar("Matrix", Tensor, np.ndarray)


def check_cut(cut: Cut, size: int, what: str) -> None:
    """Raises ValueError when the cut is not one of an axis of ``size``."""
    if cut.size != size:
        raise ValueError(f"{what}: the cut is of an axis of {cut.size}, the tensor has {size}")
    if cut.spans and cut.order is not None:
        raise ValueError(f"{what}: a cut has spans or an order, not both")
    for lo, hi in cut.spans:
        if not 0 <= lo <= hi <= size:
            raise ValueError(f"{what}: span ({lo}, {hi}), expected 0 <= lo <= hi <= {size}")
    order = cut.order
    if order is not None:
        if order.ndim != 1 or order.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{what}: the order is {order.dtype} of {order.ndim} dimensions, expected int64 (n,)"
            )
        if order.numel() and not (0 <= int(order.min()) <= int(order.max()) < size):
            raise ValueError(
                f"{what}: the order runs from {int(order.min())} to {int(order.max())}, size is {size}"
            )


def spans_of(cut: Cut) -> tuple[tuple[int, int], ...]:
    """The spans of a cut without an order; the whole axis is one span."""
    return cut.spans or ((0, cut.size),)


def take(matrix: Matrix, cut: Cut, axis: int = 0) -> Matrix:
    """The cut of an axis, 0 or 1, of a tensor or array mapped from a file; touches the cut's part only."""
    if isinstance(matrix, Tensor):
        if cut.order is not None:
            return matrix.index_select(axis, cut.order.long())
        parts = [matrix.narrow(axis, lo, hi - lo) for lo, hi in spans_of(cut)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    if cut.order is not None:
        return np.take(matrix, cut.order.numpy(), axis)
    arrays = [matrix[lo:hi] if axis == 0 else matrix[:, lo:hi] for lo, hi in spans_of(cut)]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)
