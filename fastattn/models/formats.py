"""Which formats of few bits a text allows: coarse ones at the points that bear them (see `quality`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from ..collectives.compressed import Compressed
from ..parallel.calibrate import ChannelShares, recording
from ..parallel.candidates import Candidate
from ..parallel.forecast import SITES
from ..quant.codec import Codec
from ..spec import Site, SyncPolicy
from .perplexity import Perplexity, nll
from .quality import Quality


class Format(NamedTuple):
    """A codec, and the share of the channels that each point keeps in 16 bits, its own outliers."""

    codec: Codec
    outliers: float

    def at(self, channels: Sequence[int]) -> Codec:
        """With these outliers."""
        return replace(self.codec, outliers=tuple(channels))

    def count(self, hidden: int) -> int:
        """Number of outliers."""
        return round(self.outliers * hidden)

    def typical(self, hidden: int) -> Codec:
        """With as many outliers as any point has: takes the same time and bytes."""
        return self.at(range(self.count(hidden)))


#: Formats that are tried; 1/36 of SmolLM2-135M's channels are 16.
FORMATS = (
    Format(Codec(element="e2m1", block=32, scale="e4m3", search=True), 1 / 36),
    Format(Codec(element="e2m2", block=32, scale="e4m3", search=True), 1 / 72),
    Format(Codec(element="e2m3", block=64, scale="fp16", search=True), 1 / 144),
    Format(Codec(element="int8", block=32, scale="fp16"), 0.0),
)


class Allowed(NamedTuple):
    """A codec for each layer's points of each site, and by which share they raise the perplexity."""

    attn: tuple[Codec, ...]
    mlp: tuple[Codec, ...]
    increase: Perplexity

    def policies(self, make: Callable[[Codec], SyncPolicy]) -> Candidate:
        """The candidate in which each point has the policy that ``make`` gives for its codec."""
        return Candidate(tuple(map(make, self.attn)), tuple(map(make, self.mlp)))


class Formats:
    """What the text allows; each format is measured once. ``say`` hears of what was measured."""

    def __init__(self, quality: Quality, say: Callable[[str], None]) -> None:
        self.quality, self._say = quality, say
        self._uniform: dict[Format, Allowed] = {}
        self._mixed: dict[tuple[Format, Format], Allowed | None] = {}

    def allowed(self, formats: Sequence[Format]) -> list[tuple[Format, Allowed]]:
        """The first of ``formats`` that is within the bound at all points, alone and mixed with the first
        before it, that is not. Empty if none is.
        """
        coarse: Format | None = None
        for fine in formats:
            found = self._measured(fine)
            if not self.quality.keeps(found.increase):
                coarse = coarse or fine
                continue
            mixed = None if coarse is None else self._mix(coarse, fine, found)
            return [(fine, found)] if mixed is None else [(fine, found), (fine, mixed)]
        return []

    @cached_property
    def _shares(self) -> ChannelShares:
        model = self.quality.model
        with recording(model.decoder) as shares:
            nll(model, self.quality.calibration)
        shares.merge(model.group)
        return shares

    def codecs(self, f: Format) -> tuple[tuple[Codec, ...], tuple[Codec, ...]]:
        """The format at the attention and MLP points of each layer, with their outliers on the text."""
        config = self.quality.model.config
        count, layers = f.count(config.hidden_size), range(config.num_layers)
        channels = self._shares.outliers(count) if count else {}
        attn, mlp = (tuple(f.at(channels.get((n, site), ())) for n in layers) for site in SITES)
        return attn, mlp

    def _measured(self, f: Format) -> Allowed:
        if f not in self._uniform:
            found = Allowed(*self.codecs(f), Perplexity(0.0, 0.0))
            increase = self.quality.increase(_compressed(found))
            self._uniform[f] = found._replace(increase=increase)
            verdict = "within" if self.quality.keeps(increase) else "beyond"
            self._say(f"{_compressed(found)}: {_text(increase)}, {verdict} the bound")
        return self._uniform[f]

    def _mix(self, coarse: Format, fine: Format, base: Allowed) -> Allowed | None:
        if (coarse, fine) not in self._mixed:
            low = Allowed(*self.codecs(coarse), base.increase)
            self._mixed[coarse, fine] = found = mix_within_bound(self.quality, low, base)
            if found is not None:
                count = sum(c in (*low.attn, *low.mlp) for c in (*found.attn, *found.mlp))
                self._say(f"{_compressed(found)}, the coarse one at {count} points: {_text(found.increase)}")
        return self._mixed[coarse, fine]


def mix_within_bound(quality: Quality, coarse: Allowed, fine: Allowed) -> Allowed | None:
    """``coarse`` at as many points as the bound allows, the least sensitive first, ``fine`` at the others.

    All points save the same bytes, so this is the order of bytes saved per perplexity lost. ``fine`` is
    within the bound. What single points cost is taken to add up; all together are then measured, and a
    quarter of the points given back until the bound holds. None if none remains.
    """
    points: list[tuple[Site, int]] = [(site, n) for n in range(len(fine.attn)) for site in SITES]

    def mixed(chosen: Sequence[tuple[Site, int]]) -> Allowed:
        attn, mlp = (
            tuple(pair[(site, n) not in chosen] for n, pair in enumerate(zip(low, high, strict=True)))
            for site, low, high in zip(SITES, coarse[:2], fine[:2], strict=True)
        )
        return Allowed(attn, mlp, fine.increase)

    varied = [_compressed(mixed([p])) for p in points]
    cost = dict(zip(points, quality.differences(varied, _compressed(fine)), strict=True))
    room = quality.max_increase - quality.upper(fine.increase)
    chosen: list[tuple[Site, int]] = []
    for point in sorted(cost, key=cost.__getitem__):
        room -= max(0.0, cost[point])
        if room < 0:
            break
        chosen.append(point)
    while chosen:
        found = mixed(chosen)
        found = found._replace(increase=quality.increase(_compressed(found)))
        if quality.keeps(found.increase):
            return found
        chosen = chosen[: len(chosen) * 3 // 4]
    return None


def _compressed(a: Allowed) -> Candidate:
    return a.policies(lambda codec: Compressed(codec=codec))


def _text(increase: Perplexity) -> str:
    return f"perplexity {increase.value:+.2%} +- {increase.error:.2%}"
