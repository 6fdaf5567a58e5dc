"""Which formats of few bits a text allows: coarse ones at the points that bear them (see `quality`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..collectives.compressed import Compressed
from ..parallel.candidates import Candidate
from ..parallel.schedule import Plain
from ..quant.codec import Codec
from ..spec import Site, SyncPolicy
from .perplexity import Perplexity
from .quality import Quality

#: Formats that are tried.
CODECS = (
    Codec(element="e2m1", block=32, scale="e4m3", search=True),
    Codec(element="int4", block=32, scale="fp16", search=True, rotate=64),
    Codec(element="e2m2", block=32, scale="e4m3", search=True),
    Codec(element="e2m3", block=32, scale="even"),
    Codec(element="int8", block=32, scale="fp16"),
)
SITES: tuple[Site, Site] = ("attn", "mlp")


class Allowed(NamedTuple):
    """A codec for each layer's points of each site, and by which share it raises the perplexity."""

    attn: tuple[Codec, ...]
    mlp: tuple[Codec, ...]
    increase: Perplexity

    def policies(self, make: Callable[[Codec], SyncPolicy]) -> Candidate:
        """The candidate in which each point has the policy that ``make`` gives for its codec."""
        return Candidate(tuple(map(make, self.attn)), tuple(map(make, self.mlp)))


class Formats:
    """What the text allows; each codec is measured once. ``say`` hears of what was measured."""

    def __init__(self, quality: Quality, say: Callable[[str], None]) -> None:
        self.quality, self._say = quality, say
        self._known: dict[Codec, Perplexity] = {}
        self._mixed: dict[tuple[Codec, Codec], Allowed | None] = {}

    def allowed(self, codecs: Sequence[Codec]) -> list[Allowed]:
        """The first of ``codecs`` that is within the bound at all points, and that mixed with the one before.

        Empty if none is.
        """
        coarse: Codec | None = None
        for codec in codecs:
            increase = self._increase(codec)
            if not self.quality.keeps(increase):
                coarse = coarse or codec
                continue
            layers = self.quality.model.config.num_layers
            found = [Allowed((codec,) * layers, (codec,) * layers, increase)]
            mixed = None if coarse is None else self._mix(coarse, codec, increase)
            return found if mixed is None else [*found, mixed]
        return []

    def _increase(self, codec: Codec) -> Perplexity:
        if codec not in self._known:
            layers = self.quality.model.config.num_layers
            uniform = Candidate.uniform(Compressed(codec=codec), Plain(), layers)
            self._known[codec] = found = self.quality.increase(uniform)
            verdict = "within" if self.quality.keeps(found) else "beyond"
            self._say(f"{uniform}: perplexity {found.value:+.2%} +- {found.error:.2%}, {verdict} the bound")
        return self._known[codec]

    def _mix(self, coarse: Codec, fine: Codec, base: Perplexity) -> Allowed | None:
        if (coarse, fine) not in self._mixed:
            self._mixed[coarse, fine] = found = mix_within_bound(self.quality, coarse, fine, base)
            if found is not None:
                count = (*found.attn, *found.mlp).count(coarse)
                increase = f"perplexity {found.increase.value:+.2%} +- {found.increase.error:.2%}"
                self._say(f"{Compressed(codec=coarse)} at {count} points: {increase}")
        return self._mixed[coarse, fine]


def mix_within_bound(quality: Quality, coarse: Codec, fine: Codec, base: Perplexity) -> Allowed | None:
    """``coarse`` at as many points as the bound allows, the least sensitive first, ``fine`` at the others.

    All points save the same bytes, so this is the order of bytes saved per perplexity lost. ``base``: the
    increase with ``fine`` alone, within the bound. What single points cost is taken to add up; all together
    are then measured, and a quarter of the points given back until the bound holds. None if none remains.
    """
    layers = quality.model.config.num_layers
    points: list[tuple[Site, int]] = [(site, n) for n in range(layers) for site in SITES]

    def codecs(chosen: Sequence[tuple[Site, int]]) -> Allowed:
        attn, mlp = (tuple(coarse if (s, n) in chosen else fine for n in range(layers)) for s in SITES)
        return Allowed(attn, mlp, base)

    def mixed(chosen: Sequence[tuple[Site, int]]) -> Candidate:
        attn, mlp = (
            tuple(Compressed(codec=coarse if (s, n) in chosen else fine) for n in range(layers))
            for s in SITES
        )
        return Candidate(attn, mlp)

    cost = dict(zip(points, quality.differences([mixed([p]) for p in points], mixed([])), strict=True))
    room = quality.max_increase - quality.upper(base)
    chosen: list[tuple[Site, int]] = []
    for point in sorted(cost, key=cost.__getitem__):
        room -= max(0.0, cost[point])
        if room < 0:
            break
        chosen.append(point)
    while chosen:
        increase = quality.increase(mixed(chosen))
        if quality.keeps(increase):
            return codecs(chosen)._replace(increase=increase)
        chosen = chosen[: len(chosen) * 3 // 4]
    return None
