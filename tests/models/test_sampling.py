"""Sampling and stop texts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.models.sampling import LogitsError, Sampler, SamplingParams, StopText

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -1.0]])


def frequencies(params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    sampler = Sampler(params, 1)
    tokens = sampler(LOGITS.expand(draws, -1), [0] * draws)
    return torch.bincount(torch.tensor(tokens), minlength=5) / draws


def test_greedy() -> None:
    assert Sampler(SamplingParams(), 1)(LOGITS, [0]) == [1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    found = frequencies(SamplingParams(temperature=temperature))
    wanted = (LOGITS[0] / temperature).softmax(-1)
    # Five standard deviations of a binomial share.
    assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    assert Sampler(SamplingParams(temperature=temperature), 1)(100 * LOGITS, [0]) == [1]


@pytest.mark.parametrize("seed", [-1, (1 << 63) - 1])
def test_seeds_at_the_ends(seed: int) -> None:
    assert len(Sampler(SamplingParams(temperature=1.0, seed=seed), 3)(LOGITS.expand(3, -1), [0, 1, 2])) == 3


def test_top_k() -> None:
    found = frequencies(SamplingParams(temperature=1.0, top_k=2))
    assert (found > 0).tolist() == [False, True, False, True, False]


def test_top_k_of_equal_logits_is_k_tokens() -> None:
    params = SamplingParams(temperature=1.0, top_k=2)
    tokens = Sampler(params, 1)(torch.zeros(500, 9), [0] * 500)
    assert len(set(tokens)) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_numbers(bad: float, temperature: float) -> None:
    logits = LOGITS.repeat(2, 1)
    logits[1] = logits[1] * 0 + bad if bad < 0 else logits[1]
    logits[1, 2] = bad
    sampler = Sampler(SamplingParams(temperature=temperature), 8)
    with pytest.raises(LogitsError, match="largest logit of sequence 7 is NaN or infinite"):
        sampler(logits, [3, 7])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_not_chosen(temperature: float) -> None:
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 2] = -3.0
    assert Sampler(SamplingParams(temperature=temperature), 1)(logits, [0]) == [2]


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    p = LOGITS[0].softmax(-1)
    two = float(p[1] + p[3])
    assert (frequencies(SamplingParams(temperature=1.0, top_p=two - 1e-3)) > 0).sum() == 2
    assert (frequencies(SamplingParams(temperature=1.0, top_p=two + 1e-3)) > 0).sum() == 3
    assert (frequencies(SamplingParams(temperature=1.0, top_p=1e-9)) > 0).tolist() == [0, 1, 0, 0, 0]


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    params = SamplingParams(temperature=1.0, seed=3)
    alone, together = Sampler(params, 2), Sampler(params, 2)
    for _ in range(10):
        pair = together(LOGITS.expand(2, -1), [0, 1])
        assert alone(LOGITS, [1]) == pair[1:]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("stop", ("",)),
        ("stop", "###"),
        ("seed", 1 << 63),
    ],
)
def test_bad_parameters(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}:"):
        SamplingParams(**{field: value})


@given(st.lists(st.text("abc", max_size=4)), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_text_shows_exactly_what_precedes_the_first_stop(pieces: list[str], stops: list[str]) -> None:
    matcher, shown, seen = StopText(stops), "", ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        at = [seen.find(s) for s in stops if s in seen]
        assert matcher.stopped == bool(at)
        if at:
            assert shown == seen[: min(at)]
            return
        assert seen.startswith(shown)
    assert shown + matcher.push("", last=True) == seen
