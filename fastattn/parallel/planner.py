"""The choice of `fastattn plan`: the model says what is worth measuring, measurement what is chosen.

Whole forwards of the real model are measured, on the running ranks, in rounds in which all candidates take
turns, so that what else the machines and the link do meets all of them. Every decision follows from the
slowest rank's times, which all ranks know: all choose the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from time import perf_counter
from typing import NamedTuple, Protocol

import torch

from ..collectives.compressed import CodecWire
from ..collectives.wire import Plain as PlainWire
from ..collectives.wire import Wire
from ..quant.codec import Codec
from ..spec import Link, Phase, Point, Schedule, Site, SyncPolicy, TPGroup
from . import measure
from .candidates import Candidate, family
from .forecast import SITES, Costs, seconds, wire_bytes
from .schedule import Plain

MARGIN = 0.97  # of exact's time: what is not faster than that does not replace it
_ROUNDS = (3, 400)  # at least and at most
_FINAL_ROUNDS = 5  # at least
_HOPELESS = 1.3  # times the fastest: not measured further
_FINALISTS = 3  # of the fastest measured
_WITHIN = 1.5  # times the fastest by the model: still worth measuring, one of each family


class Subject(Protocol):
    """A model whose forwards can be run under any policies."""

    num_layers: int

    def rows(self, phase: Phase) -> Sequence[int]:
        """Rows of each forward that `run` makes."""
        ...

    def run(
        self,
        phase: Phase,
        policy: Callable[[Point], SyncPolicy],
        schedule: Schedule,
        prompt_tokens: int | None = None,
    ) -> None:
        """A prefill of the planned prompt or its beginning, or one decode step of the planned batch."""
        ...


@dataclass
class Trial:
    """A candidate with what the model says and what was measured."""

    candidate: Candidate
    modelled_s: float
    wire_bytes: int
    samples: list[float] = field(default_factory=list)  # seconds, of the slowest rank
    site_samples: dict[Site, list[float]] = field(default_factory=dict)  # where the schedule is plain

    @property
    def measured_s(self) -> float | None:
        """The median."""
        return statistics.median(self.samples) if self.samples else None


class Choice(NamedTuple):
    """The trial that was chosen for a phase, and why; all of them, the fastest by the model first."""

    trial: Trial
    reason: str
    trials: list[Trial]


def costs(
    g: TPGroup, subject: Subject, phase: Phase, link: Link, hidden: int, dtype: torch.dtype,
    codecs: Sequence[Codec] = (),
) -> Costs:  # fmt: skip
    """Measures the half-blocks of a phase (of a prompt: at a quarter, half and all of its first forward) and
    the work of coding a message.
    """
    rows = subject.rows(phase)[0]
    counts = sorted({max(2, rows // 4), max(2, rows // 2), rows}) if phase == "prefill" else [rows]
    found = [measure.half_blocks(g, _alone(subject, phase, n), n) for n in counts]
    wires: list[Wire] = [PlainWire(dtype.itemsize), *map(CodecWire, codecs)]
    value_s, *coded = [measure.value_s(g, wire, rows, hidden, dtype) for wire in wires]
    rates = {
        site: measure.rates([h[site] for h in found], value_s, dtype.itemsize, g.world) for site in SITES
    }
    return Costs(link, rates, dict(zip(codecs, coded, strict=True)), hidden)


def _alone(subject: Subject, phase: Phase, rows: int) -> Callable[[SyncPolicy], None]:
    return lambda policy: subject.run(phase, lambda _: policy, Plain(), rows)


def forecasts(found: Iterable[Candidate], rows: Sequence[int], costs: Costs) -> list[Trial]:
    """By modelled time, the least first; equal ones in the order given."""
    world = next(iter(costs.rates.values())).world
    trials = [
        Trial(
            c,
            sum(seconds(c, n, costs) for n in rows),
            sum(wire_bytes(c, n, costs.hidden, world) for n in rows),
        )
        for c in found
    ]
    return forecast_order(trials)


def shortlist(trials: Sequence[Trial], exact: Candidate, best: int = 4) -> list[Trial]:
    """What is measured: ``exact``, the ``best`` by the model, the best of each family that is not far behind,
    and the best tilings of the policy whose tiling is the best.
    """
    limit = _WITHIN * trials[0].modelled_s
    kept = [next(t for t in trials if t.candidate == exact), *trials[:best]]
    families: set[tuple[str, ...]] = set()
    for t in trials:
        if t.modelled_s <= limit and family(t.candidate) not in families:
            families.add(family(t.candidate))
            kept.append(t)
    tiled = [t for t in trials if t.candidate.attn[0].name == "tiled" and t.modelled_s <= limit]
    kept += [t for t in tiled if family(t.candidate) == family(tiled[0].candidate)][:3]
    return [t for t in trials if any(t is k for k in kept)]


def choose(
    g: TPGroup, subject: Subject, phase: Phase, found: Sequence[Candidate], costs: Costs,
    budget_s: float = 20.0, *, permits: Callable[[Candidate], bool] = lambda _: True,
) -> Choice:  # fmt: skip
    """Models all candidates, measures the promising ones, and takes the fastest measured.

    ``found``: the first is `Exact` for all points, which everything is compared with. ``budget_s``: about
    what measuring may take; those of the final round at least five times whatever it takes. ``permits``:
    whether a candidate that is among the fastest may be chosen.
    """
    exact, rows = found[0], subject.rows(phase)
    trials = forecasts(found, rows, costs)
    listed = shortlist(trials, exact)
    measure_all(g, subject, phase, listed, budget_s / 2, prune=True)
    permitted = (t.candidate for t in by_time(listed) if permits(t.candidate))
    finalists = [exact, *islice(permitted, _FINALISTS)]
    merged = best_of_sites(listed)
    if merged is not None and merged not in found and permits(merged):
        finalists.append(merged)
    # Anew: of many noisy medians the least is too low.
    final = forecasts(dict.fromkeys(finalists), rows, costs)
    measure_all(g, subject, phase, final, budget_s / 2, prune=False, least=_FINAL_ROUNDS)
    base = next(t for t in final if t.candidate == exact)
    others = [t for t in trials if t.candidate not in finalists]
    return Choice(*decide(base, by_time(final)[0]), forecast_order([*final, *others]))


def decide(base: Trial, best: Trial) -> tuple[Trial, str]:
    """``best``, if it is clearly faster than ``base``, exact sums, which stays otherwise; and why.

    Compared round by round: both were measured in turn, and what slows the machines meets both.
    """
    if best is base:
        return base, "nothing measured was faster"
    gain = 1 / statistics.median(b / a for a, b in zip(base.samples, best.samples, strict=True))
    if gain * MARGIN < 1:
        return base, f"the fastest measured, {best.candidate}, is only {gain:.3f}x as fast"
    return best, f"round by round {gain:.2f}x as fast as exact"


def by_time(trials: Iterable[Trial]) -> list[Trial]:
    """The measured ones, the fastest first."""
    return sorted((t for t in trials if t.samples), key=lambda t: statistics.median(t.samples))


def forecast_order(trials: Iterable[Trial]) -> list[Trial]:
    """The fastest by the model first."""
    return sorted(trials, key=lambda t: t.modelled_s)


# -------------------------------------------------------------------------------------------- measuring
def measure_all(
    g: TPGroup, subject: Subject, phase: Phase, trials: Sequence[Trial], budget_s: float,
    *, prune: bool, least: int = _ROUNDS[0],
) -> None:  # fmt: skip
    """Adds samples to the trials, in rounds, at least so many of each and as many as the budget allows; with
    ``prune`` those that are clearly slower drop out.
    """
    most = _ROUNDS[1]
    running, spent_s = list(trials), 0.0
    for n in range(most):
        turn = n % len(running)
        taken = [_sample(g, subject, phase, t) for t in (*running[turn:], *running[:turn])]
        spent_s += sum(taken)
        if n + 1 >= least and spent_s + sum(taken) > budget_s:
            return
        # One sample is enough of long forwards: there is less noise in them, and more to save.
        if prune and (n > 0 or spent_s > budget_s / 3):
            limit = _HOPELESS * min(min(t.samples) for t in running)
            running = [t for t in running if min(t.samples) <= limit or t.candidate.is_baseline]


def _sample(g: TPGroup, subject: Subject, phase: Phase, trial: Trial) -> float:
    marks: list[tuple[Site, float]] = []

    def policy(p: Point) -> SyncPolicy:
        marks.append((p.site, perf_counter()))
        return trial.candidate.policy(p)

    measure.together(g)
    begin = perf_counter()
    subject.run(phase, policy, trial.candidate.schedule)
    end = perf_counter()
    mine = [end - begin]
    if isinstance(trial.candidate.schedule, Plain):
        # A half-block begins when the model asks for the policy of the sync point behind it.
        spans = [(site, until - since) for (site, since), (_, until) in pairwise([*marks, ("attn", end)])]
        mine += [sum(s for site, s in spans if site == wanted) for wanted in SITES]
    total, *sites = measure.slowest(g, mine, f"measuring {phase}")
    trial.samples.append(total)
    for site, s in zip(SITES, sites, strict=False):
        trial.site_samples.setdefault(site, []).append(s)
    return total


def best_of_sites(trials: Sequence[Trial]) -> Candidate | None:
    """The policies with which each site was the fastest, together; None if nothing was measured by site."""
    plain = [t for t in trials if t.site_samples]
    if not plain:
        return None
    best: Mapping[Site, Trial] = {
        site: min(plain, key=lambda t, s=site: statistics.median(t.site_samples[s]))  # type: ignore[misc]
        for site in SITES
    }
    return Candidate(best["attn"].candidate.attn, best["mlp"].candidate.mlp)
