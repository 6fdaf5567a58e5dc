"""The planner's model of time and its choices, on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattn.collectives.compressed import Compressed
from fastattn.collectives.direct import Direct
from fastattn.collectives.exact import Exact
from fastattn.collectives.fused_norm import FusedNorm
from fastattn.collectives.star import Star
from fastattn.collectives.sums import EAGER_BYTES
from fastattn.collectives.tiled import Tiled
from fastattn.parallel.candidates import Candidate, candidates, codec_of, family, overlaps, with_codec
from fastattn.parallel.forecast import Costs, communication_share, seconds, wire_bytes
from fastattn.parallel.measure import HalfBlock, fit, rates
from fastattn.parallel.planner import Trial, best_of_sites, by_time, decide, forecasts, shortlist
from fastattn.parallel.schedule import Plain, TokenWeave
from fastattn.quant.codec import Codec
from fastattn.spec import Link, Rates, TPGroup

TWO, FOUR = (TPGroup(None, 0, world, 1.0, (1 / world,) * world) for world in (2, 4))
LINK = Link(latency_s=0.001, bytes_per_s=1e6, all_reduce_s=0.002, all_reduce_bytes_per_s=2e6)
RATE = Rates(fixed_s=0.0005, row_s=0.0001, value_s=0.0, item_bytes=2, world=2)
HIDDEN = 100
COSTS = Costs(LINK, {"attn": RATE, "mlp": RATE._replace(row_s=0.0003)}, {}, HIDDEN)
EXACT = Candidate.uniform(Exact(2), Plain(), 3)
WEAVE = TokenWeave(min_tokens=2, multiple=1)


# --------------------------------------------------------------------------------------------- the fit
@given(st.floats(0, 1), st.floats(1e-9, 1e-3))
def test_fit_finds_the_line(fixed: float, each: float) -> None:
    samples = [(x, fixed + each * x) for x in (64, 512, 4096, 32768)]
    found = fit(samples)
    assert found == (pytest.approx(fixed, abs=1e-6 * samples[0][1]), pytest.approx(each, rel=1e-4))


def test_fit_weighs_errors_relative_to_the_time() -> None:
    """A tenth more or less: the small message says the latency, the large one the bandwidth."""
    samples = [(64, 1.1e-3), (512, 1.4e-3), (1 << 20, 1.0), (1 << 21, 2.1)]
    fixed, each = fit(samples)
    assert fixed == pytest.approx(1e-3, rel=0.1)
    assert each == pytest.approx(1 / (1 << 20), rel=0.1)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(8, 0.5)], (0.5, 0.0)),  # one alone says nothing of the slope
        ([(1, 1.0), (2, 2.5)], (0.0, pytest.approx(1.8 / 1.64))),  # would begin below zero
        ([(1, 2.0), (2, 1.0)], (pytest.approx(1.2), 0.0)),  # would fall
    ],
)
def test_fit_is_never_negative(samples: list[tuple[float, float]], expected: tuple[float, float]) -> None:
    assert fit(samples) == expected


def test_rates_from_half_blocks() -> None:
    found = [HalfBlock(n, 0.0005 + 0.0001 * n, 0.00002 * n) for n in (64, 128, 256)]
    got = rates(found, value_s=3e-9, item_bytes=2, world=4)
    assert got.half_block(512) == pytest.approx(0.0005 + 0.00012 * 512)
    assert got.norm_row_s == pytest.approx(0.00002)
    assert got[2:5] == (3e-9, 2, 4)


# ------------------------------------------------------------------------------------- the model of time
def test_plain_forwards_add_up() -> None:
    # Exact of 10 rows and two ranks: 2 ms + 2 steps of 10 * 100 / 2 values of 2 bytes at 2 MB/s = 3 ms.
    attn, mlp, sync = 0.0005 + 10 * 0.0001, 0.0005 + 10 * 0.0003, 0.003
    assert seconds(EXACT, 10, COSTS) == pytest.approx(3 * (attn + mlp + 2 * sync))
    # Direct: 1 ms + 2000 bytes at 1 MB/s = 3 ms as well.
    direct = Candidate.uniform(Direct(item_bytes=2), Plain(), 3)
    assert seconds(direct, 10, COSTS) == pytest.approx(seconds(EXACT, 10, COSTS))
    mixed = Candidate(EXACT.attn, (Star(0, 2),) * 3)  # two hops of 1 ms + 2 ms
    assert seconds(mixed, 10, COSTS) == pytest.approx(3 * (attn + mlp + sync + 0.006))
    assert communication_share(10, COSTS) == pytest.approx(0.006 / (0.006 + attn + mlp))


def test_tiles_hide_all_but_the_last_sum_where_computation_is_longer() -> None:
    costs = COSTS._replace(rates=dict.fromkeys(("attn", "mlp"), RATE._replace(row_s=0.001, fixed_s=0.0)))
    tiled = Candidate.uniform(Tiled(Exact(2), (3, 1)), Plain(), 1)
    # 8 rows: 6 ms, then 2 ms in which the first sum (2 + 0.6 ms) does not end; the last takes 2.2 ms.
    assert seconds(tiled, 8, costs) == pytest.approx(2 * (0.006 + 0.0026 + 0.0022))


def test_woven_halves_compute_while_the_other_is_summed() -> None:
    rate = Rates(row_s=0.001, item_bytes=2, world=2)
    costs = Costs(Link(0.0, 1e6), {"attn": rate, "mlp": rate}, {}, HIDDEN)
    woven = Candidate.uniform(Direct(item_bytes=2), WEAVE, 2)
    # 10 rows, halves of 5: each computes 5 ms and is summed in 1 ms. Computation never waits, and the last
    # half's last sum is left over.
    assert seconds(woven, 10, costs) == pytest.approx(4 * 2 * 0.005 + 0.001)
    slow = costs._replace(link=Link(0.0, 1e5))  # a sum takes 10 ms: the link never waits
    assert seconds(woven, 10, slow) == pytest.approx(0.005 + 4 * 2 * 0.010)
    late = costs._replace(link=Link(0.1, 1e6))  # of both halves under way at once, latency passes once
    assert seconds(woven, 10, late) == pytest.approx(4 * (0.005 + 0.001 + 0.1) + 0.005)


def test_an_announcement_does_not_occupy_the_link() -> None:
    """Of long messages both latencies, the announcement's and the message's, pass once for both halves."""
    rate, row = Rates(row_s=0.001, item_bytes=2, world=2), EAGER_BYTES // 4
    costs = Costs(Link(0.1, 5 * row / 0.001), {"attn": rate, "mlp": rate}, {}, row // 2)
    woven = Candidate.uniform(Direct(item_bytes=2), WEAVE, 2)
    # Halves of 5 rows: 5 ms of computing, 1 ms of bytes.
    assert seconds(woven, 10, costs) == pytest.approx(4 * (0.005 + 0.001 + 2 * 0.1) + 0.005)
    # An all-reduce has a latency of its own.
    ring = costs._replace(link=costs.link._replace(all_reduce_s=0.3))
    exact = Candidate.uniform(Exact(2), WEAVE, 2)
    assert seconds(exact, 10, ring) == pytest.approx(4 * (0.005 + 0.001 + 0.3) + 0.005)


def test_a_long_message_is_announced_after_computing() -> None:
    hidden, direct = EAGER_BYTES // 8, Direct(item_bytes=2)  # 4 rows are the longest that is asked for before
    short, long = (direct.seconds(rows, hidden, LINK, RATE) for rows in (4, 5))
    assert short == pytest.approx(LINK.latency_s + 8 * hidden / LINK.bytes_per_s)
    assert long == pytest.approx(2 * LINK.latency_s + 10 * hidden / LINK.bytes_per_s)


def test_more_tiles_leave_less_to_wait_for_at_both_ends() -> None:
    rate = Rates(row_s=0.001, item_bytes=2, world=2)
    costs = Costs(Link(0.0, 2e5), {"attn": rate, "mlp": rate}, {}, HIDDEN)  # 1 ms a row to compute and to sum
    times = []
    for count in (1, 2, 4, 8):
        weave = TokenWeave(2, (1.0,) * count, multiple=1)
        times.append(seconds(Candidate.uniform(Direct(item_bytes=2), weave, 2), 8, costs))
    # Four half-blocks of 8 ms; the last tile's sum is what is left over.
    assert times == pytest.approx([0.064, 0.036, 0.034, 0.033])


def test_fused_norm_spares_the_other_ranks_rows() -> None:
    costs = COSTS._replace(rates=dict.fromkeys(("attn", "mlp"), RATE._replace(norm_row_s=0.00005)))
    fused = Candidate.uniform(FusedNorm(Direct(item_bytes=2)), Plain(), 1)
    # Two hops of 1 ms and 500 values each; half the norm.
    expected = 2 * (0.0005 + 0.001 + 2 * (0.001 + 0.001) - 5 * 0.00005)
    assert seconds(fused, 10, costs) == pytest.approx(expected)


def test_messages_of_a_codec_take_its_own_time() -> None:
    codec = Codec(element="int8", block=32, scale="fp16")
    policy = Compressed(codec=replace(codec, outliers=(7, 100)))
    costs = COSTS._replace(hidden=128, codec_value_s={replace(codec, outliers=(0, 1)): 1e-7})
    base = policy.seconds(10, 128, LINK, RATE)
    extra = 10 * 128 * 3 * 1e-7  # encode one message, decode two
    given_ = Candidate.uniform(policy, Plain(), 1)
    compute = 0.0015 + 0.0035
    assert seconds(given_, 10, costs) == pytest.approx(compute + 2 * (base + extra))
    assert codec_of(Tiled(Exact())) is None
    for around in (policy, Tiled(policy, (1, 2)), FusedNorm(policy)):
        assert codec_of(around) == policy.codec
        assert codec_of(with_codec(around, codec)) == codec
        assert with_codec(with_codec(around, codec), policy.codec) == around


def test_bytes_of_a_forward() -> None:
    assert wire_bytes(EXACT, 10, HIDDEN, 2) == 3 * 2 * 2000
    woven = Candidate.uniform(Direct(item_bytes=2), WEAVE, 3)
    assert wire_bytes(woven, 10, HIDDEN, 4) == 3 * 2 * 3 * 2000


# ------------------------------------------------------------------------------------------- candidates
def test_candidates_begin_with_exact_and_hold_every_kind() -> None:
    found = candidates("prefill", 256, 2, FOUR, 2)
    assert found[0] == Candidate.uniform(Exact(2), Plain(), 2)
    assert found[0].is_baseline
    assert not any(c.is_baseline for c in found[1:])
    assert len(set(found)) == len(found)
    names = {str(c) for c in found}
    assert {"exact", "star:hub=3", "direct:scheme=one_step", "direct:scheme=two_step"} <= names
    assert {"tiled:tiles=1/2", "tiled:tiles=2/1+star", "token_weave:min_tokens=128+exact"} <= names
    assert "token_weave:min_tokens=128,tiles=1/1/1/1+fused_norm" in names
    assert all(c.exact for c in found)


def test_a_fused_norm_is_one_candidate_whatever_the_scheme() -> None:
    """It always takes two steps: with an inner scheme each would be measured twice under two names."""
    codec = Codec(element="e2m1", block=16)
    for codecs, count in (((), 1), ((codec,), 2)):
        found = candidates("prefill", 256, 2, FOUR, 2, codecs)
        fused = [c for c in found if isinstance(c.attn[0], FusedNorm)]
        assert len({c.schedule for c in fused}) == 4
        assert len(fused) == 4 * count
        assert not any("scheme" in str(c) for c in fused)


def test_decode_of_one_sequence_is_neither_split_nor_scattered() -> None:
    found = candidates("decode", 1, 2, TWO, 2)
    assert {family(c)[1] for c in found} == {"exact", "direct", "star"}
    assert all(isinstance(c.schedule, Plain) for c in found)


def test_codecs_add_lossy_candidates() -> None:
    codec = Codec(element="e2m1", block=16)
    exact = candidates("prefill", 256, 2, TWO, 2)
    more = [c for c in candidates("prefill", 256, 2, TWO, 2, [codec]) if c not in exact]
    assert all(codec_of(p) == codec for c in more for p in (*c.attn, *c.mlp))
    assert not any(c.exact for c in more)
    kinds = {family(c)[:2] for c in more}
    assert kinds == {(s, n) for s in ("plain", "token_weave") for n in ("compressed", "fused_norm")} | {
        ("plain", "tiled")
    }


def test_a_candidate_says_what_it_is() -> None:
    assert str(EXACT) == "exact"
    assert (
        str(Candidate((Star(0, 2), Star(1, 2)), (Exact(2), Exact(2))))
        == "attn star or star:hub=1 | mlp exact"
    )
    codec = Codec(element="int4", outliers=(3, 9))
    tiled = Tiled(Compressed(codec=codec), (1, 2))
    same = Tiled(Compressed(codec=replace(codec, outliers=(4, 5))), (1, 2))
    name = "tiled:tiles=1/2+compressed:element=int4 (2 outliers)"
    assert str(Candidate((tiled, same), (same, tiled))) == name
    assert str(Candidate.uniform(Direct(item_bytes=2), WEAVE, 2)).startswith("token_weave:min_tokens=2")


# --------------------------------------------------------------------------------------------- choices
def trial(c: Candidate, *samples: float, sites: tuple[float, float] | None = None) -> Trial:
    t = Trial(c, 1.0, 0, list(samples))
    if sites:
        t.site_samples = {"attn": [sites[0]], "mlp": [sites[1]]}
    return t


STAR, DIRECT = (Candidate.uniform(p, Plain(), 3) for p in (Star(0, 2), Direct(item_bytes=2)))


def test_the_fastest_measured_is_chosen_not_the_fastest_modelled() -> None:
    base, star, direct = trial(EXACT, 1.0), trial(STAR, 0.9, 0.5, 0.6), trial(DIRECT, 0.7, 0.8, 0.1)
    direct.modelled_s = 0.01
    # Medians 1.0, 0.6, 0.7; one is not measured.
    assert by_time([base, star, direct, trial(EXACT)]) == [star, direct, base]


def test_the_choice_is_compared_with_exact_round_by_round() -> None:
    """The machine became slower from round to round: of both the last is three times the first."""
    base, star = trial(EXACT, 1.0, 2.0, 3.0), trial(STAR, 0.5, 1.0, 2.5)
    assert decide(base, star) == (star, "round by round 2.00x as fast as exact")
    base, star = trial(EXACT, 1.0, 2.0, 9.0), trial(STAR, 1.0, 1.99, 1.0)
    assert decide(base, star)[0] is base


def test_exact_stays_unless_it_is_clearly_slower() -> None:
    base = trial(EXACT, 1.0)
    assert decide(base, trial(STAR, 0.98)) == (base, "the fastest measured, star, is only 1.020x as fast")
    assert decide(base, trial(STAR, 0.96))[0].candidate == STAR
    assert decide(base, base) == (base, "nothing measured was faster")


def test_each_site_may_have_its_own_policy() -> None:
    woven = trial(Candidate.uniform(Star(0, 2), WEAVE, 3), 0.1)  # says nothing of the sites
    both = [trial(STAR, 1.0, sites=(0.2, 0.8)), trial(DIRECT, 1.0, sites=(0.6, 0.4)), woven]
    assert best_of_sites(both) == Candidate(STAR.attn, DIRECT.mlp)
    assert best_of_sites([woven]) is None


def test_the_shortlist_has_exact_the_best_and_one_of_each_family() -> None:
    trials = forecasts(candidates("prefill", 256, 3, FOUR, 2), [256], COSTS)
    assert [t.modelled_s for t in trials] == sorted(t.modelled_s for t in trials)
    listed = shortlist(trials, candidates("prefill", 256, 3, FOUR, 2)[0])
    assert sum(t.candidate.is_baseline for t in listed) == 1
    assert listed[:4] == trials[:4]
    for kind in (True, False):  # that promises more stands in nothing's way
        alike = [t for t in trials if overlaps(t.candidate) == kind]
        wanted = {family(t.candidate) for t in alike if t.modelled_s <= 1.5 * alike[0].modelled_s}
        assert wanted <= {family(t.candidate) for t in listed}
    assert len(listed) < len(trials) / 2
    assert sum(t.candidate.attn[0].name == "tiled" for t in listed) >= 3


def test_a_prompt_of_several_forwards_adds_up() -> None:
    (one,), (two,) = forecasts([EXACT], [10], COSTS), forecasts([EXACT], [10, 10], COSTS)
    assert (two.modelled_s, two.wire_bytes) == (pytest.approx(2 * one.modelled_s), 2 * one.wire_bytes)
