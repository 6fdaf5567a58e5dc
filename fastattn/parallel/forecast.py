"""The model of a forward's time: alpha-beta for each sync point, and what overlaps what.

Half-blocks and sync points add up, where a schedule does not let some of the rows compute while the sums of
others are under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..collectives.exact import Exact
from ..quant.codec import Codec
from ..spec import Link, Rates, Site, SyncPolicy
from .candidates import Candidate, codec_of

SITES: tuple[Site, Site] = ("attn", "mlp")


class Costs(NamedTuple):
    """What was measured, for one phase of one model on these ranks."""

    link: Link
    rates: Mapping[Site, Rates]
    codec_value_s: Mapping[Codec, float]  # `Rates.value_s` of formats, whose outliers are the first channels
    hidden: int

    def rate(self, site: Site, policy: SyncPolicy) -> Rates:
        """With the work that this policy has with a message's values."""
        codec, rate = codec_of(policy), self.rates[site]
        if codec is None:
            return rate
        typical = replace(codec, outliers=tuple(range(len(codec.outliers))))
        return rate._replace(value_s=self.codec_value_s[typical])


class _Stage(NamedTuple):
    """A half-block and its sync point."""

    compute_s: float
    busy_s: float  # of the link: what would be left without latency
    latency_s: float  # behind that, while another tile's bytes may travel


def seconds(c: Candidate, rows: int, costs: Costs) -> float:
    """Modelled time of all layers of one forward of ``rows`` rows."""
    tiles = tile_rows(c, rows)
    known: dict[Any, list[_Stage]] = {}  # most layers have the same policies
    for site, policy in zip(SITES, (c.attn, c.mlp), strict=True):
        for p in policy:
            if (site, p) not in known:
                known[site, p] = [_stage(site, p, n, costs) for n in tiles]
    layers = zip(c.attn, c.mlp, strict=True)
    points = [known[site, p] for layer in layers for site, p in zip(SITES, layer, strict=True)]
    computed, link_free = 0.0, 0.0
    ready = [0.0] * len(tiles)
    for stage in points:
        for i, part in enumerate(stage):
            computed = max(computed, ready[i]) + part.compute_s
            link_free = max(link_free, computed) + part.busy_s
            ready[i] = link_free + part.latency_s
    return max(ready)


def _stage(site: Site, policy: SyncPolicy, rows: int, costs: Costs) -> _Stage:
    rate = costs.rate(site, policy)
    link = costs.link
    without = link._replace(latency_s=0.0, all_reduce_s=None if link.all_reduce_s is None else 0.0)
    total = policy.seconds(rows, costs.hidden, link, rate)
    busy = max(0.0, policy.seconds(rows, costs.hidden, without, rate))
    return _Stage(rate.half_block(rows), busy, max(0.0, total - busy))


def wire_bytes(c: Candidate, rows: int, hidden: int, world: int) -> int:
    """Bytes of one forward that the rank which sends most sends, of the sync points."""
    tiles = tile_rows(c, rows)
    return sum(p.wire_bytes(n, hidden, world) for p in (*c.attn, *c.mlp) for n in tiles)


def tile_rows(c: Candidate, rows: int) -> list[int]:
    """Rows of each tile that passes the layers."""
    return [hi - lo for lo, hi in c.schedule.spans(rows)]


def communication_share(rows: int, costs: Costs) -> float:
    """Share of the modelled time that `Exact` spends in communication."""
    rates = costs.rates.values()
    sync = sum(Exact(r.item_bytes).seconds(rows, costs.hidden, costs.link, r) for r in rates)
    return sync / (sync + sum(r.half_block(rows) for r in rates))
