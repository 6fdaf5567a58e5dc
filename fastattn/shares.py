"""Shares of what ranks or tiles divide: positive numbers, of which only the proportions count."""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEAST, _MOST = 1e-100, 1e100  # products and quotients of two are floats too


def usable(shares: Sequence[float]) -> bool:
    """Whether there are some, all of them positive and of ordinary size."""
    return bool(shares) and all(_LEAST <= share <= _MOST for share in shares)


def normalised(shares: Sequence[float]) -> tuple[float, ...]:
    """The same proportions, of 1 in all."""
    total = math.fsum(shares)
    return tuple(share / total for share in shares)
