"""Sums by messages between all pairs of ranks, in one step or two."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Link, Point, Rates, TPGroup
from .cost import one_step_bytes, one_step_seconds, two_step_bytes, two_step_seconds
from .exchange import Lane, against_messages
from .policy import Sum
from .steps import Steps
from .sums import Partial, one_step, two_step
from .wire import Wire

SCHEMES = ("auto", "one_step", "two_step")


@dataclass(frozen=True, kw_only=True)
class Pairwise(Sum):
    """``scheme``: ``one_step`` sends everything to everybody, in one hop; ``two_step`` has each rank add a
    share of the rows and send it to all, in two hops whose bytes do not grow with the ranks; ``auto`` takes
    two steps for at least 3 ranks, one row each, and messages of ``two_step_bytes``.
    """

    scheme: str = "auto"
    two_step_bytes: int = 1 << 15

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme: {self.scheme!r}, expected one of {', '.join(SCHEMES)}")
        if self.two_step_bytes < 0:
            raise ValueError(f"two_step_bytes: {self.two_step_bytes}, expected at least 0")

    @property
    @abstractmethod
    def wire(self) -> Wire:
        """How values travel."""

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        """[] if the policy can run at point ``p``."""
        return super().reasons(p, rows, hidden, dtype, g) + against_messages(g)

    def takes_two_steps(self, rows: int, hidden: int, world: int) -> bool:
        """Whether partial results of this size are summed in two steps."""
        if self.scheme != "auto":
            return self.scheme == "two_step"
        return world > 2 and rows >= world and self.wire.message_bytes(rows, hidden) >= self.two_step_bytes

    def steps(self, lane: Lane, x: Partial) -> Steps[Tensor]:
        two = self.takes_two_steps(x.rows, x.hidden, lane.group.world)
        return (yield from (two_step if two else one_step)(lane, x, self.wire))

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        two = self.takes_two_steps(rows, hidden, rate.world)
        return (two_step_seconds if two else one_step_seconds)(self.wire, rows, hidden, link, rate)

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        two = self.takes_two_steps(rows, hidden, world)
        return (two_step_bytes if two else one_step_bytes)(self.wire, rows, hidden, world)
