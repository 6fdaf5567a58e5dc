"""The policy `star` (TPI-LLM, arXiv 2410.00531): reduce to a hub, which broadcasts the sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..spec import Link, Point, Rates, TPGroup
from .cost import star_bytes, star_seconds
from .exchange import Lane, against_messages
from .policy import Sum
from .steps import Steps
from .sums import Partial, star
from .wire import Plain


@dataclass(frozen=True)
class Star(Sum):
    """Two hops, whatever the number of ranks; the hub's link carries all messages.

    ``hub``: the rank with the best link. ``item_bytes``: of one activation on the wire.
    """

    hub: int = 0
    item_bytes: int = 4

    name: ClassVar[str] = "star"

    def __post_init__(self) -> None:
        if self.hub < 0:
            raise ValueError(f"hub: {self.hub}, expected a rank")

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        reasons = super().reasons(p, rows, hidden, dtype, g) + against_messages(g)
        if self.hub >= g.world:
            reasons.append(f"hub is rank {self.hub}, there are {g.world} ranks")
        return reasons

    def steps(self, lane: Lane, x: Partial) -> Steps[Tensor]:
        return (yield from star(lane, x, Plain(self.item_bytes), self.hub))

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        return star_seconds(Plain(self.item_bytes), rows, hidden, link, rate)

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        return star_bytes(Plain(self.item_bytes), rows, hidden, world)
