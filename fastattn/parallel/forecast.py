"""The model of a forward's time: alpha-beta for each sync point, and what overlaps what.

Half-blocks and sync points add up, where a schedule does not let one half of the rows compute while the other
half's sums are under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from ..collectives.exact import Exact
from ..quant.codec import Codec
from ..spec import Link, Rates, Site, SyncPolicy
from .candidates import Candidate

SITES: tuple[Site, Site] = ("attn", "mlp")


class Costs(NamedTuple):
    """What was measured, for one phase of one model on these ranks."""

    link: Link
    rates: Mapping[Site, Rates]
    codec_value_s: Mapping[Codec, float]  # `Rates.value_s` of what sends in these formats
    hidden: int

    def rate(self, site: Site, policy: SyncPolicy) -> Rates:
        """With the work that this policy has with a message's values."""
        codec = codec_of(policy)
        rate = self.rates[site]
        return rate if codec is None else rate._replace(value_s=self.codec_value_s[codec])


def codec_of(policy: SyncPolicy) -> Codec | None:
    """In which format a policy sends; None: values as they are."""
    inner = policy
    while hasattr(inner, "of"):
        inner = inner.of
    found = getattr(inner, "codec", None)
    return found if isinstance(found, Codec) else None


def seconds(c: Candidate, rows: int, costs: Costs) -> float:
    """Modelled time of all layers of one forward of ``rows`` rows."""
    split = c.schedule.split(rows)
    halves = (split, rows - split) if split else (rows,)

    @cache
    def stages(site: Site, policy: SyncPolicy) -> tuple[tuple[float, float, float], ...]:
        return tuple(_stage(site, policy, n, costs) for n in halves)

    points = [stages(site, p) for pair in zip(c.attn, c.mlp, strict=True) for site, p in zip(SITES, pair, strict=True)]
    computed, link_free = 0.0, 0.0
    ready = [0.0] * len(halves)
    for stage in points:
        for i, (compute_s, busy_s, latency_s) in enumerate(stage):
            computed = max(computed, ready[i]) + compute_s
            link_free = max(link_free, computed) + busy_s
            ready[i] = link_free + latency_s
    return max(ready)


def _stage(site: Site, policy: SyncPolicy, rows: int, costs: Costs) -> tuple[float, float, float]:
    """Of a half-block and its sync point: compute, what keeps the link busy, and the latency behind it."""
    rate = costs.rate(site, policy)
    total = policy.seconds(rows, costs.hidden, costs.link, rate)
    latency = min(max(0.0, policy.seconds(0, costs.hidden, costs.link, rate)), max(0.0, total))
    return rate.half_block(rows), total - latency, latency


def wire_bytes(c: Candidate, rows: int, hidden: int, world: int) -> int:
    """Bytes of one forward that the rank which sends most sends, of the sync points."""
    split = c.schedule.split(rows)
    halves = (split, rows - split) if split else (rows,)
    return sum(p.wire_bytes(n, hidden, world) for p in (*c.attn, *c.mlp) for n in halves)


def communication_share(rows: int, costs: Costs) -> float:
    """Share of the modelled time that `Exact` spends in communication; above one half, it bounds the model."""
    sync = {s: Exact(costs.rates[s].item_bytes).seconds(rows, costs.hidden, costs.link, costs.rates[s]) for s in SITES}
    compute = sum(costs.rates[s].half_block(rows) for s in SITES)
    return sum(sync.values()) / (sum(sync.values()) + compute)
