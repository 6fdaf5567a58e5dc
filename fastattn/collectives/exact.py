"""The policy `exact`: one all-reduce of the whole partial result at each sync point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..spec import Link, Rates
from .exchange import Lane, all_reduce
from .policy import Sum
from .steps import Steps
from .sums import Partial


@dataclass(frozen=True)
class Exact(Sum):
    """``residual + bias + sum over ranks of (partial + pending)``, by the backend's own all-reduce.

    The sum is formed in the activations' dtype, which is also what travels. ``item_bytes`` is the size of
    one activation, for `wire_bytes`: 2 for 16-bit models.
    """

    item_bytes: int = 4

    name: ClassVar[str] = "exact"

    def steps(self, lane: Lane, x: Partial) -> Steps[Tensor]:
        total = x.compute()
        yield all_reduce(lane.group, total, lane.where)
        return total

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        """Ring all-reduce: 2 (N - 1) steps, each one hop and one N-th of the bytes."""
        steps = 2 * (rate.world - 1)
        latency = steps * link.latency_s if link.all_reduce_s is None else link.all_reduce_s
        chunk = -(-rows * hidden // rate.world) * rate.item_bytes
        rate_of_ring = link.all_reduce_bytes_per_s or link.bytes_per_s
        return latency + steps * chunk / rate_of_ring if steps else 0.0

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        """2 (N - 1) chunks of one N-th."""
        return 2 * (world - 1) * -(-rows * hidden // world) * self.item_bytes
