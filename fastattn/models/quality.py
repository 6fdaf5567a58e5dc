"""What lossy sync policies cost in quality: perplexity on a text, against exact sums, on the running ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..collectives.exact import Exact
from ..collectives.exchange import broadcast, device_of
from ..collectives.prompts import broadcast_prompts, refuse_prompts
from ..parallel.candidates import Candidate
from ..parallel.plan import PHASES
from ..parallel.schedule import Plain
from ..spec import Site, SyncPolicy
from .generate import Model
from .perplexity import Perplexity, change, chunks, nll, perplexity
from .trial import deciding

CONTEXT = 512  # tokens of a chunk
_Z = 1.645  # one-sided 95 %


class Quality:
    """The text, and its likelihood under exact sums.

    ``text``: of rank 0, the others pass None. ``count``: chunks of it that are scored. ``max_increase``: of
    the perplexity that a plan may cost, relative; the upper end of its 95 % confidence interval counts.
    Raises ValueError on every rank when the text is too short.
    """

    def __init__(self, model: Model, text: str | None, max_increase: float, count: int = 16) -> None:
        if not 0 < max_increase < float("inf"):
            raise ValueError(f"max_increase: {max_increase}, expected a positive share of the perplexity")
        self.model, self.max_increase = model, max_increase
        context = min(CONTEXT, model.config.max_position)
        ids = None
        if model.group.rank == 0:
            try:
                assert text is not None
                ids = chunks(model.tokenizer, text, context, count)
            except Exception:
                refuse_prompts(model.group)
                raise
        self.ids = broadcast_prompts(model.group, ids)
        exact = Candidate.uniform(Exact(model.dtype.itemsize), Plain(), model.config.num_layers)
        self._exact = [self._nll(exact, [chunk]) for chunk in self.ids]
        mean = self._shared(perplexity(torch.cat(self._exact)) if model.group.rank == 0 else None)
        self.exact = mean  #: perplexity under exact sums

    @property
    def tokens(self) -> int:
        """That are scored."""
        return sum(len(chunk) - len(chunk) // 2 for chunk in self.ids)

    def increase(self, c: Candidate, count: int | None = None) -> Perplexity:
        """By which share the perplexity grows under the candidate's policies, on the first ``count`` chunks."""
        ids, exact = self.ids[:count], self._exact[:count]
        found = self._nll(c, ids)
        return self._shared(change(found, torch.cat(exact)) if self.model.group.rank == 0 else None)

    def keeps(self, increase: Perplexity) -> bool:
        """Whether that is within the bound."""
        return increase.value + _Z * increase.error <= self.max_increase

    def sensitivities(self, low: SyncPolicy, high: SyncPolicy, count: int) -> dict[tuple[Site, int], float]:
        """By how much the perplexity grows with ``low`` at one point alone and ``high`` at all others.

        Measured on ``count`` chunks, against ``high`` at all points.
        """
        layers, rank = self.model.config.num_layers, self.model.group.rank
        base = Candidate.uniform(high, Plain(), layers)
        losses = self._nll(base, self.ids[:count])
        points: list[tuple[Site, int]] = [(site, n) for n in range(layers) for site in ("attn", "mlp")]
        found = {}
        for site, n in tqdm(points, desc="sensitivity", unit="point", disable=rank != 0):
            mixed = mix(low, high, layers, [(site, n)])
            own = self._nll(mixed, self.ids[:count])
            found[site, n] = self._shared(change(own, losses) if rank == 0 else None).value
        return found

    def _nll(self, c: Candidate, ids: Sequence[Sequence[int]]) -> Tensor:
        schedules = dict.fromkeys(PHASES, Plain())
        with deciding(self.model, c.policy, schedules):
            return nll(self.model, ids)

    def _shared(self, mine: Perplexity | None) -> Perplexity:
        """Rank 0's, on every rank."""
        values = torch.tensor(mine or (0.0, 0.0), dtype=torch.float64, device=device_of(self.model.group))
        broadcast(self.model.group, values, "perplexity from rank 0")
        return Perplexity(*values.tolist())


def mix(
    low: SyncPolicy, high: SyncPolicy, num_layers: int, points: Sequence[tuple[Site, int]]
) -> Candidate:
    """``low`` at these points, ``high`` at the others."""
    sites: tuple[Site, Site] = ("attn", "mlp")
    attn, mlp = (tuple(low if (s, n) in points else high for n in range(num_layers)) for s in sites)
    return Candidate(attn, mlp)


def within_budget(
    quality: Quality, low: SyncPolicy, high: SyncPolicy, base: Perplexity
) -> tuple[Candidate, Perplexity] | None:
    """``low`` at as many points as the bound allows, the least sensitive first, ``high`` at the others.

    All points save the same bytes, so the order of sensitivity is that of bytes saved per perplexity lost.
    ``base``: the increase with ``high`` alone, within the bound. What single points cost is taken to add up;
    the sum of them is then measured, and points are given back until it holds. None if none remains.
    """
    count = max(1, len(quality.ids) // 4)
    cost = quality.sensitivities(low, high, count)
    room, chosen = quality.max_increase - base.value - _Z * base.error, list[tuple[Site, int]]()
    for point in sorted(cost, key=cost.__getitem__):
        room -= max(0.0, cost[point])
        if room < 0:
            break
        chosen.append(point)
    while chosen:
        mixed = mix(low, high, quality.model.config.num_layers, chosen)
        found = quality.increase(mixed)
        if quality.keeps(found):
            return mixed, found
        chosen = chosen[: len(chosen) * 3 // 4]
    return None
