"""Logits and greedy tokens equal Hugging Face transformers' on the same weights, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.sampling import SamplingParams
from tests.models.builders import hf_model, save_hf
from tests.models.hf_smollm2 import huggingface_model

TEXT = (
    "The lighthouse keeper wrote every evening in the same brown ledger. He noted the wind, the height of"
    " the sea, the ships that passed, and the hour at which the lamp was lit. In forty years he had "
    "missed two days: the one on which his daughter was born, and the one on which the great storm took "
    "the landing stage and half of the boats in the harbour below. When the lamp was replaced by a "
    "machine that needed nobody, he went on writing. The wind still blew, he said, whether or not a lamp "
    "was there to see it, and somebody ought to keep an account. His grandson found the ledgers in 1987, "
    "forty-one of them, in a tin chest under the stairs. He took them to the university, where a young "
    "climatologist read them through in one winter. She had been looking for exactly this: a continuous "
    "record of 14,600 days, made by one patient man, at one place, with the same three instruments and "
    "the same pencil."
)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama2-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": 128,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "llama-longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [2.0 + i for i in range(8)],
            }
        },
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-odd-head": ("llama", {"head_dim": 20, "num_attention_heads": 8, "num_key_value_heads": 1}),
    "mistral-window": ("mistral", {}),
    "qwen2-window": ("qwen2", {}),
    "qwen2-yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "qwen2-yarn-unextended": (  # as Qwen2.5 publishes its recipe: max_position_embeddings stays
        "qwen2",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights(name: str, tmp_path: Path) -> None:
    family, overrides = CONFIGS[name]
    theirs = hf_model(family, seed=1, **overrides)
    ours = fastattn.load(save_hf(theirs, tmp_path))
    context = ours.config.context
    generator = torch.Generator().manual_seed(2)
    for length in (1, 33, 200):
        ids = torch.randint(3, 320, (length,), generator=generator).tolist()
        with torch.no_grad():
            wanted = theirs(torch.tensor([ids])).logits[0]
        (found,) = ours.logits([ids])
        assert (found - wanted).abs().max() <= 2e-3
    count = min(32, context - length)
    (done,) = ours.generate([ids], SamplingParams(max_tokens=count, ignore_eos=True))
    # transformers' likeliest tokens. Where frequencies depend on the length, it is that of the whole.
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids + done.token_ids])).logits[0, len(ids) - 1 : -1]
    assert done.token_ids == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_err_no_more_than_transformers(dtype: str, tmp_path: Path) -> None:
    exact = hf_model("llama", seed=3)
    ours = fastattn.load(save_hf(exact, tmp_path), dtype=dtype)
    ids = torch.randint(3, 320, (100,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        wanted = exact.double()(torch.tensor([ids])).logits[0]
        theirs = exact.to(ours.dtype)(torch.tensor([ids])).logits[0]
    error = (ours.logits([ids])[0] - wanted).abs().max()
    assert error <= 2 * (theirs - wanted).abs().max()


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    theirs = huggingface_model(Path(open_checkpoint("smollm2").path))
    return theirs, fastattn.load("smollm2", dtype="fp32")


def test_smollm2_logits(smollm2: tuple[Any, Any]) -> None:
    theirs, ours = smollm2
    ids = ours.tokenizer.encode(TEXT)
    assert len(ids) >= 200
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    assert (ours.logits([ids])[0] - wanted).abs().max() <= 2e-3


def test_smollm2_greedy_tokens(smollm2: tuple[Any, Any]) -> None:
    theirs, ours = smollm2
    ids = ours.tokenizer.encode(TEXT[:400])
    (done,) = ours.generate([ids], SamplingParams(max_tokens=64, ignore_eos=True))
    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor([ids]), do_sample=False, min_new_tokens=64, max_new_tokens=64, pad_token_id=2
        )
    assert done.token_ids == wanted[0, len(ids) :].tolist()
