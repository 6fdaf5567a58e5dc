"""Perplexity: chunks of a text, likelihoods against transformers, and paired comparisons."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import fastattn
from fastattn.models.perplexity import change, chunks, nll, perplexity
from tests.models.builders import byte_level_tokenizer, hf_model, save_hf
from tests.models.vocabularies import built, byte_level_fields

TEXT = "The quick brown fox jumps over the lazy dog, and numbers like 1234 follow. " * 40


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", seed=5), tmp_path_factory.mktemp("model"))


def test_chunks_lie_evenly_and_apart(directory: Path) -> None:
    tokenizer = fastattn.load(directory).tokenizer
    tokens = byte_level_tokenizer().encode(TEXT).ids
    for context, count in ((16, 1), (16, 7), (33, len(tokens) // 33)):
        made = chunks(tokenizer, TEXT, context, count)
        assert [len(c) for c in made] == [context] * count
        step = (len(tokens) - context) / max(1, count - 1)
        starts = [int(i * step) for i in range(count)]
        assert made == [tokens[s : s + context] for s in starts]
        assert all(b - a >= context for a, b in pairwise(starts))


def test_chunks_begin_as_texts_begin_and_do_not_end() -> None:
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    tokenizer = built({**byte_level_fields(), **flags})
    (chunk,) = chunks(tokenizer, TEXT, 16, 1)
    assert chunk == tokenizer.encode(TEXT)[:16]
    assert (chunk[0], chunk.count(2)) == (0, 0)


@pytest.mark.parametrize(("context", "count"), [(16, 0), (1, 4), (16, 10_000)])
def test_a_text_that_is_too_short_is_refused(directory: Path, context: int, count: int) -> None:
    with pytest.raises(ValueError, match=r"text: \d+ tokens, too few for"):
        chunks(fastattn.load(directory).tokenizer, TEXT, context, count)


@pytest.mark.parametrize("step", [None, 3])
@pytest.mark.parametrize("context", [16, 17])
def test_likelihoods_equal_those_of_transformers(directory: Path, context: int, step: int | None) -> None:
    model, reference = fastattn.load(directory), hf_model("llama", seed=5)
    made = chunks(model.tokenizer, TEXT, context, 3)
    half = context // 2
    with torch.no_grad():
        logits = reference(torch.tensor(made)).logits[:, half - 1 : -1]
    targets = torch.tensor(made)[:, half:]
    expected = cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="none")
    found = nll(model, made, step)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_perplexity_and_its_error() -> None:
    losses = torch.rand(50, dtype=torch.float64)
    found = perplexity(losses)
    assert found.value == pytest.approx(math.exp(losses.mean()))
    assert found.error == pytest.approx(found.value * float(losses.std(unbiased=False)) / 50**0.5)


def test_change_is_paired() -> None:
    """What all tokens share cancels: the error is that of the differences alone."""
    base = torch.rand(200, dtype=torch.float64) * 10
    worse = change(base + 0.01, base)
    assert worse.value == pytest.approx(math.expm1(0.01))
    assert worse.error < 1e-12
    noisy = base + torch.randn(200, dtype=torch.float64) * 0.1
    ratio = perplexity(noisy).value / perplexity(base).value
    assert change(noisy, base).value == pytest.approx(ratio - 1)
    assert change(noisy, base).error == pytest.approx(ratio * 0.1 / 200**0.5, rel=0.2)
    assert change(base, base) == (0.0, 0.0)
