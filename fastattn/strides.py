"""Memory layouts that kernels ask for."""

from __future__ import annotations

import torch
from torch import Tensor


def has_contiguous_rows(t: Tensor) -> bool:
    """Whether neighbours in the last dimension are neighbours in memory, also when ``t`` is empty."""
    return t.stride(-1) == 1 or t.shape[-1] == 1


def contiguous_rows(t: Tensor) -> Tensor:
    """``t`` with a contiguous last dimension, also when it is empty (which `contiguous` leaves alone)."""
    return t if has_contiguous_rows(t) else t.clone(memory_format=torch.contiguous_format)
