"""Generation: batches, chunks, stops, streaming, limits. On a small model with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import fastattn
from fastattn.models import generate as module
from fastattn.models.generate import Model
from fastattn.models.sampling import LogitsError, SamplingParams
from tests.models.builders import hf_model, save_hf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return fastattn.load(save_hf(hf_model("mistral", seed=5), tmp_path_factory.mktemp("model")))


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


def test_a_batch_of_unequal_prompts_equals_each_alone(model: Model) -> None:
    batch = prompts(1, 40, 7, 33)
    together = model.generate(batch, GREEDY)
    for prompt, done in zip(batch, together, strict=True):
        (alone,) = model.generate([prompt], GREEDY)
        assert (done.prompt_ids, done.token_ids, done.text) == (prompt, alone.token_ids, alone.text)
        assert (done.finish_reason, len(done.token_ids)) == ("length", 12)
        assert 0 < done.ttft_s <= done.latency_s


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_prefill_in_chunks_equals_prefill_at_once(
    model: Model, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prompts(3, 21, 16)
    wanted = [c.token_ids for c in model.generate(batch, GREEDY)]
    monkeypatch.setattr(module, "PREFILL_TOKENS", limit)
    assert [c.token_ids for c in model.generate(batch, GREEDY)] == wanted


@pytest.mark.parametrize("step", [1, 4, 40, 99])
def test_logits_in_steps_equal_those_at_once(model: Model, step: int) -> None:
    batch = prompts(41, 5)
    stepped = model.logits(batch, step)
    for part, whole in zip(stepped, model.logits(batch), strict=True):
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="step: 0, expected at least 1"):
        model.logits(batch, 0)


@pytest.mark.parametrize(("lengths", "limit"), [([3, 21, 16], 5), ([8, 8], 8), ([1], 9), ([7, 0, 2], 3)])
def test_chunks_cover_everything_in_order(lengths: list[int], limit: int) -> None:
    chunks = module.chunks(lengths, limit)
    assert all(0 < sum(hi - lo for _, lo, hi in chunk) <= limit for chunk in chunks)
    rows = [(seq, i) for chunk in chunks for seq, lo, hi in chunk for i in range(lo, hi)]
    assert rows == [(seq, i) for seq, n in enumerate(lengths) for i in range(n)]


def test_streamed_text_is_the_text(model: Model) -> None:
    seen: dict[int, list] = {0: [], 1: []}
    done = model.generate(prompts(4, 9), GREEDY, on_token=lambda s, t, text: seen[s].append((t, text)))
    for seq, c in enumerate(done):
        assert [t for t, _ in seen[seq]] == c.token_ids
        assert "".join(text for _, text in seen[seq]) == c.text
        decode = model.tokenizer.decode
        assert c.text == decode(c.prompt_ids + c.token_ids)[len(decode(c.prompt_ids)) :]


def test_seeds(model: Model) -> None:
    batch = prompts(5, 5)
    random = SamplingParams(max_tokens=12, temperature=1.5, seed=1, ignore_eos=True)
    first, again = ([c.token_ids for c in model.generate([batch[0], batch[0]], random)] for _ in range(2))
    assert first == again
    assert first[0] != first[1], "sequences of a batch draw from streams of their own"
    other = SamplingParams(max_tokens=12, temperature=1.5, seed=2, ignore_eos=True)
    assert [c.token_ids for c in model.generate([batch[0]], other)] == first[1:]


def test_end_token_stops_and_is_not_part_of_the_completion(model: Model, tmp_path: Path) -> None:
    (prompt,) = prompts(6)
    (free,) = model.generate([prompt], GREEDY)
    end = free.token_ids[5]
    at = free.token_ids.index(end)
    folder = save_hf(hf_model("mistral", seed=5), tmp_path)
    # No other file names this one.
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(end)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": text}))
    (folder / "generation_config.json").unlink()
    ended = fastattn.load(folder)
    shown: list[int] = []
    ended.generate([prompt], SamplingParams(max_tokens=12), on_token=lambda s, t, text: shown.append(t))
    assert shown == [*free.token_ids[:at], end]
    # The other sequence goes on after this one has ended.
    done, other = ended.generate([prompt, prompts(1, 11)[1]], SamplingParams(max_tokens=12))
    assert (done.token_ids, done.finish_reason) == (free.token_ids[:at], "stop")
    assert other.finish_reason == "length" or other.token_ids.count(end) == 0


def test_stop_text(model: Model) -> None:
    (prompt,) = prompts(6)
    (free,) = model.generate([prompt], GREEDY)
    stop = free.text[4:7]
    shown: list[str] = []
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop=(stop,))
    (done,) = model.generate([prompt], params, on_token=lambda s, t, text: shown.append(text))
    assert done.text == "".join(shown) == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"
    assert len(done.token_ids) < len(free.token_ids)


def test_the_context_limits_a_completion(model: Model) -> None:
    context = model.config.max_position
    (prompt,) = prompts(context - 3)
    (done,) = model.generate([prompt], SamplingParams(max_tokens=50, ignore_eos=True))
    assert (len(done.token_ids), done.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no tokens"),
        ("", "no tokens"),
        ([5] * 512, "512 tokens, the model's context is 512"),
        ([320], "outside the vocabulary of 320"),
        ([-1], "outside the vocabulary"),
        (["a", "b"], "expected a text or token ids"),
        ([1.7, 5.2], "expected a text or token ids"),
    ],
    ids=["empty", "empty-text", "long", "large-id", "negative-id", "texts", "floats"],
)
def test_bad_prompts(model: Model, prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts\[1\]: .*{message}"):
        model.generate([[5], prompt], GREEDY)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("The", "prompts: the text 'The', expected a list"),
        ([5, 6], r"prompts\[0\]: 5, expected a text or token"),
    ],
    ids=["text", "ids"],
)
def test_one_prompt_is_not_a_batch(model: Model, prompts: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, GREEDY)


def test_logits_take_the_whole_context_and_no_more(model: Model) -> None:
    context = model.config.max_position
    (whole,) = model.logits(prompts(context))
    assert whole.shape == (context, model.config.vocab_size)
    with pytest.raises(ValueError, match=f"{context + 1} tokens, the model's context is {context}"):
        model.logits(prompts(context + 1))
    with pytest.raises(ValueError, match=r"prompts\[0\]: no tokens"):
        model.logits([[]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers(temperature: float, tmp_path: Path) -> None:
    theirs = hf_model("llama")
    with torch.no_grad():
        theirs.model.norm.weight[3] = float("nan")
    broken = fastattn.load(save_hf(theirs, tmp_path))
    with pytest.raises(LogitsError, match="largest logit of sequence 0 is NaN or infinite"):
        broken.generate([[5]], SamplingParams(temperature=temperature))


def test_weights_that_become_no_numbers(tmp_path: Path) -> None:
    """After the first token, where a native call goes from token to token."""
    model = fastattn.load(save_hf(hf_model("llama"), tmp_path))
    seen: list[int] = []

    def on_token(seq: int, token: int, text: str) -> None:
        seen.append(seq)
        if len(seen) == 6:
            model.decoder.norm.weight[3] = float("inf")

    asked = SamplingParams(max_tokens=20, ignore_eos=True)
    with pytest.raises(LogitsError, match="largest logit of sequence 0 is NaN or infinite"):
        model.generate([[5], [6, 7]], asked, on_token=on_token)
    assert seen == [0, 1] * 3


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    """LongRoPE, other factors past 40 tokens: transformers' model and ours."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 40,
        "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)],
    }  # fmt: skip
    theirs = hf_model("llama", seed=8, rope_parameters=rope)
    return theirs, fastattn.load(save_hf(theirs, tmp_path_factory.mktemp("long")))


def test_longrope_in_chunks_equals_transformers(
    long: tuple[Any, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = long
    monkeypatch.setattr(module, "PREFILL_TOKENS", 16)
    (prompt,) = prompts(70)
    (done,) = ours.generate([prompt], GREEDY)
    whole = prompt + done.token_ids
    with torch.no_grad():
        wanted = theirs(torch.tensor([whole])).logits[0]
    assert done.token_ids == wanted[len(prompt) - 1 : -1].argmax(-1).tolist()
    for step in (None, 1, 16):
        torch.testing.assert_close(ours.logits([whole], step)[0], wanted, atol=1e-4, rtol=1e-4)


def test_longrope_in_a_batch_equals_each_alone(long: tuple[Any, Model]) -> None:
    _, ours = long
    batch = prompts(15, 70, 30)  # stays short, is long, becomes long
    together = ours.generate(batch, GREEDY)
    for prompt, done in zip(batch, together, strict=True):
        assert done.token_ids == ours.generate([prompt], GREEDY)[0].token_ids


def test_no_prompts(model: Model) -> None:
    assert model.generate([], GREEDY) == []


def test_unknown_dtype(tmp_path: Path) -> None:
    directory = save_hf(hf_model("llama"), tmp_path)
    with pytest.raises(ValueError, match="dtype: 'fp8', expected auto, float32"):
        fastattn.load(directory, dtype="fp8")
    with pytest.raises(ValueError, match=r"dtype: torch\.int8"):
        fastattn.load(directory, dtype=torch.int8)
