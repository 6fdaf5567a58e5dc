"""Cases that every rank of a group runs (run.py): what `fastattn plan` measures and chooses."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch

import fastattn
from fastattn.collectives.compressed import Compressed
from fastattn.collectives.direct import Direct
from fastattn.collectives.exact import Exact
from fastattn.collectives.exchange import agree, all_gather
from fastattn.collectives.star import Star
from fastattn.models.formats import FORMATS, Format, Formats
from fastattn.models.generate import Model
from fastattn.models.planning import Planner
from fastattn.models.quality import Quality
from fastattn.models.sampling import SamplingParams
from fastattn.models.trial import Trials, deciding
from fastattn.parallel import measure
from fastattn.parallel import plan as plans
from fastattn.parallel.candidates import Candidate
from fastattn.parallel.forecast import Costs
from fastattn.parallel.planner import choose, costs
from fastattn.parallel.schedule import Plain
from fastattn.quant.codec import Codec
from fastattn.spec import Link, Phase, Point, Rates, Schedule, SyncPolicy, TPGroup
from tests.parallel.run import Case, run

LAYERS = 3
FINE = Format(Codec(element="int8", scale="fp16"), 0.0)
COARSE = Format(Codec(element="e1m1", block=32), 1 / 16)


@cache
def model(g: TPGroup) -> Model:
    return fastattn.load(os.environ["MODEL"], dtype="float32", tp=g)


@cache
def own_text(g: TPGroup) -> list[list[int]] | None:
    """Chunks that the model itself has written, so that whatever changes its predictions makes them worse."""
    params = SamplingParams(max_tokens=96, temperature=1.0, seed=1, ignore_eos=True)
    done = model(g).generate([[0, n] for n in range(3, 11)], params)
    return [c.prompt_ids + c.token_ids for c in done] if g.rank == 0 else None


def same_everywhere(g: TPGroup, what: str, value: object) -> None:
    agree(g, what, repr(value).encode())


# ------------------------------------------------------------------------------------------------ cases
def the_slowest_rank_counts(g: TPGroup) -> None:
    assert measure.slowest(g, [float(g.rank), float(-g.rank), 7.0], "test") == [g.world - 1.0, 0.0, 7.0]


def the_link_is_the_same_on_all_ranks(g: TPGroup) -> None:
    link = measure.link(g, budget_s=0.05)
    same_everywhere(g, "link", link)
    assert 0 <= link.latency_s < 0.5
    assert link.bytes_per_s > 1e5
    assert link.all_reduce_s is not None
    assert 0 <= link.all_reduce_s < 0.5


def half_blocks_take_longer_for_more_rows(g: TPGroup) -> None:
    trials = Trials(model(g), 400, 2)
    found = costs(g, trials, "prefill", Link(0.0, 1e9), 64, torch.float32, [COARSE.typical(64)])
    same_everywhere(g, "costs", found)
    for rate in found.rates.values():
        assert rate.half_block(400) > rate.half_block(100) > 0
        assert 0 < rate.norm_row_s * 400 < rate.half_block(400)
        assert rate.value_s > 0
    assert found.codec_value_s[Codec(element="e1m1", outliers=(0, 1, 2, 3))] > 0
    one = costs(g, trials, "decode", Link(0.0, 1e9), 64, torch.float32)
    assert all(r.row_s == 0 and r.fixed_s > 0 for r in one.rates.values())


class Sleeping:
    """A subject whose half-blocks take as long as their policies' names say, whatever the model thinks."""

    num_layers = LAYERS

    def __init__(self, ms: dict[tuple[str, str], float]) -> None:
        self.ms = ms

    def rows(self, phase: Phase) -> Sequence[int]:
        return (8,)

    def run(
        self,
        phase: Phase,
        policy: Callable[[Point], SyncPolicy],
        schedule: Schedule,
        prompt_tokens: int | None = None,
    ) -> None:
        for n in range(LAYERS):
            for site in ("attn", "mlp"):
                chosen = policy(Point(n, site, phase))  # type: ignore[arg-type]
                time.sleep(1e-3 * self.ms[chosen.name, site])


CHOICES = [Candidate.uniform(p, Plain(), LAYERS) for p in (Exact(), Direct(), Star())]


def flat_costs(g: TPGroup) -> Costs:
    """By these, exact sums are the fastest by far."""
    rate = Rates(fixed_s=1e-3, world=g.world)
    return Costs(Link(1.0, 1e9, all_reduce_s=0.1), {"attn": rate, "mlp": rate}, {}, 64)


def what_is_measured_as_the_fastest_is_chosen(g: TPGroup) -> None:
    ms = {(n, s): t for n, t in (("exact", 6.0), ("direct", 3.0), ("star", 9.0)) for s in ("attn", "mlp")}
    choice = choose(g, Sleeping(ms), "prefill", CHOICES, flat_costs(g), 0.2)
    assert choice.trials[0].candidate.is_baseline  # the first by the model
    assert choice.trial.candidate == CHOICES[1]
    assert choice.trial.measured_s == pytest.approx(0.018, rel=0.5)
    assert choice.reason.startswith("round by round")
    same_everywhere(g, "choice", choice)


def the_best_of_each_site_is_measured_as_one(g: TPGroup) -> None:
    ms = {
        ("exact", "attn"): 6.0, ("direct", "attn"): 2.0, ("star", "attn"): 9.0,
        ("exact", "mlp"): 6.0, ("direct", "mlp"): 9.0, ("star", "mlp"): 2.0,
    }  # fmt: skip
    choice = choose(g, Sleeping(ms), "prefill", CHOICES, flat_costs(g), 0.2)
    assert choice.trial.candidate == Candidate(CHOICES[1].attn, CHOICES[2].mlp)
    refused = choose(g, Sleeping(ms), "prefill", CHOICES, flat_costs(g), 0.2, permits=lambda _: False)
    assert refused.trial.candidate in CHOICES


def exact_sums_stay_where_nothing_is_faster(g: TPGroup) -> None:
    ms = {(n, s): 5.0 + (n != "exact") for n in ("exact", "direct", "star") for s in ("attn", "mlp")}
    assert choose(g, Sleeping(ms), "decode", CHOICES, flat_costs(g), 0.2).trial.candidate == CHOICES[0]


def policies_change_only_for_a_while(g: TPGroup) -> None:
    decoder = model(g).decoder
    before, seen = (decoder.policy, decoder.schedule), []

    def policy(p: Point) -> SyncPolicy:
        seen.append(p)
        return Exact()

    trials = Trials(model(g), 40, 3)
    assert (trials.rows("prefill"), trials.rows("decode")) == ([40], (3,))
    for phase, count in (("prefill", None), ("prefill", 9), ("decode", None)):
        seen.clear()
        trials.run(phase, policy, Plain(), count)  # type: ignore[arg-type]
        assert seen == [Point(n, s, phase) for n in range(LAYERS) for s in ("attn", "mlp")]  # type: ignore[arg-type]
    with pytest.raises(RuntimeError), deciding(model(g), policy, {}):
        raise RuntimeError
    assert (decoder.policy, decoder.schedule) == before
    for tokens, batch in ((1, 1), (512, 1), (8, 0)):
        with pytest.raises(ValueError, match="expected"):
            Trials(model(g), tokens, batch)


def perplexity_grows_with_coarser_sums(g: TPGroup) -> None:
    quality = Quality(model(g), own_text(g), 0.02)
    same_everywhere(g, "perplexity", (quality.exact, quality.digest))
    assert quality.tokens == 4 * 49
    assert len(quality.calibration) == 4
    assert quality.exact.value > 1
    exact = quality.increase(Candidate.uniform(Exact(), Plain(), LAYERS))
    assert exact == (0.0, 0.0)
    fine, coarse = (
        quality.increase(Candidate.uniform(Compressed(codec=f.codec), Plain(), LAYERS))
        for f in (FINE, COARSE)
    )
    same_everywhere(g, "increase", (fine, coarse))
    assert abs(fine.value) < 0.01 < coarse.value
    assert quality.keeps(fine)
    assert not quality.keeps(coarse)
    with pytest.raises(ValueError, match="ids: 1 chunks, expected at least 2"):
        Quality(model(g), (own_text(g) or [])[:1] if g.rank == 0 else None, 0.1)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_increase"):
            Quality(model(g), own_text(g), bad)


def a_coarse_format_goes_where_it_costs_least(g: TPGroup) -> None:
    quality, heard = Quality(model(g), own_text(g), 10.0), list[str]()
    formats = Formats(quality, heard.append)
    fine, coarse = (formats.allowed([f])[0][1] for f in (FINE, COARSE))
    assert {*fine.attn, *fine.mlp} == {FINE.codec}
    assert all(len(c.outliers) == 4 for c in (*coarse.attn, *coarse.mlp))
    assert len({*coarse.attn, *coarse.mlp}) > 1  # each point has its own outliers
    assert fine.increase.value < coarse.increase.value
    assert not any("beyond the bound" in line for line in heard)
    # A bound between the two: the coarse one alone is beyond it, and some points bear it.
    quality.max_increase = bound = (quality.upper(fine.increase) + quality.upper(coarse.increase)) / 2
    formats = Formats(quality, heard.append)
    (first, alone), (second, mixed) = formats.allowed([COARSE, FINE])
    assert (first, alone, second) == (FINE, fine, FINE)
    assert {c.element for c in (*mixed.attn, *mixed.mlp)} == {"e1m1", "int8"}
    points = zip((*mixed.attn, *mixed.mlp), (*fine.attn, *fine.mlp), (*coarse.attn, *coarse.mlp), strict=True)
    assert all(m in (f, c) for m, f, c in points)
    assert quality.upper(mixed.increase) <= bound
    same_everywhere(g, "mixed", mixed)
    assert formats.allowed([FINE, COARSE]) == [(FINE, fine)]
    assert formats.allowed([COARSE]) == []
    assert any("beyond the bound" in line for line in heard)


def a_plan_of_a_real_model_holds(g: TPGroup) -> None:
    """With a text: the plan that comes out loads, and keeps the bound."""
    m = model(g)
    quality = Quality(m, own_text(g), 0.05)
    planner = Planner(m, FINGERPRINT, Trials(m, 64, 2), quality, budget_s=0.5)
    found = planner.plan()
    same_everywhere(g, "plan", found)
    plans.verify(found.plan, g, FINGERPRINT, LAYERS, m.config.hidden_size, m.dtype)
    assert plans.from_json(json.loads(json.dumps(plans.to_json(found.plan)))) == found.plan
    for phase, choice in found.choices.items():
        base = next(t for t in choice.trials if t.candidate.is_baseline)
        assert base.measured_s is not None
        assert choice.trial.measured_s is not None
        assert choice.trial.measured_s <= base.measured_s
        facts = found.plan.quality[phase]
        assert facts["increase"] + 1.645 * facts["standard_error"] <= 0.05


def a_slow_link_brings_lossy_formats_in(g: TPGroup) -> None:
    """By the model alone: on 100 kB/s a format within the bound is ahead; on a fast link none is tried."""
    m = model(g)
    heard: list[str] = []
    planner = Planner(m, FINGERPRINT, Trials(m, 64, 1), Quality(m, own_text(g), 0.05), say=heard.append)
    typical = [f.typical(m.config.hidden_size) for f in FORMATS]
    for bytes_per_s, tried in ((1e12, False), (1e5, True)):
        link = Link(0.0, bytes_per_s, 0.0, bytes_per_s)
        measured = costs(g, planner.trials, "prefill", link, m.config.hidden_size, m.dtype, typical)
        exact = planner.candidates("prefill")
        lossy = planner.lossy("prefill", exact, measured)
        assert bool(lossy) == bool(heard) == tried
        assert not any(c.exact for c in lossy)
    rows = all_gather(g, torch.tensor([len(lossy)]), "number of candidates")
    assert len({int(n) for n in rows}) == 1


FINGERPRINT = "0123abcd"
CASES: tuple[Case, ...] = (
    the_slowest_rank_counts,
    the_link_is_the_same_on_all_ranks,
    half_blocks_take_longer_for_more_rows,
    what_is_measured_as_the_fastest_is_chosen,
    the_best_of_each_site_is_measured_as_one,
    exact_sums_stay_where_nothing_is_faster,
    policies_change_only_for_a_while,
    perplexity_grows_with_coarser_sums,
    a_coarse_format_goes_where_it_costs_least,
    a_plan_of_a_real_model_holds,
    a_slow_link_brings_lossy_formats_in,
)

if __name__ == "__main__":
    run(CASES)
