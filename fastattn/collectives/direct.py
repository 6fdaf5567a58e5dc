"""The policy `direct`: each rank sends to every other one, without stations between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .pairwise import Pairwise
from .wire import Plain, Wire


@dataclass(frozen=True, kw_only=True)
class Direct(Pairwise):
    """Exact values; sums are formed in float32, in the order of the ranks, and rounded once.

    Where latency dominates, one hop instead of a star's two. ``item_bytes``: of one activation on the wire.
    """

    item_bytes: int = 4

    name: ClassVar[str] = "direct"

    @property
    def wire(self) -> Wire:
        return Plain(self.item_bytes)
