"""Rotary tables against Hugging Face's, for every scaling."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastattn.models.config import RopeConfig
from fastattn.models.rope import RopeTables, inverse_frequencies

DIM, MAX_POSITION, THETA = 32, 128, 5e5
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
    },
    "yarn-untruncated": {"factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    "yarn-attention": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.8},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1 + i / 16 for i in range(DIM // 2)],
        "long_factor": [2 + i / 4 for i in range(DIM // 2)],
    },
}


@pytest.mark.parametrize("length", [5, 32, 33, 128, 200])
@pytest.mark.parametrize("name", SCALINGS)
def test_equals_transformers(name: str, length: int) -> None:
    kind = name.split("-", maxsplit=1)[0]
    params = SCALINGS[name]
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * DIM,
            num_attention_heads=4,
            max_position_embeddings=MAX_POSITION,
            rope_parameters={"rope_type": kind, "rope_theta": THETA, **params},
        )
    )
    with torch.no_grad():
        cos, sin = theirs(torch.empty(1), torch.arange(length)[None])
    tables = RopeTables(RopeConfig(THETA, kind, DIM, False, params), MAX_POSITION)
    for ours, wanted in zip(tables.upto(length), (cos, sin), strict=True):
        torch.testing.assert_close(ours[:length], wanted[0, :, : DIM // 2], rtol=0, atol=2e-5)


def test_tables_grow_and_are_kept() -> None:
    tables = RopeTables(RopeConfig(THETA, "default", DIM, False), MAX_POSITION)
    first = tables.upto(100)
    assert tables.upto(256)[0] is first[0]
    assert len(tables.upto(257)[0]) == 512


def test_longrope_changes_tables_at_the_original_length() -> None:
    tables = RopeTables(RopeConfig(THETA, "longrope", DIM, False, SCALINGS["longrope"]), MAX_POSITION)
    short, long = tables.upto(32)[0], tables.upto(33)[0]
    assert not torch.equal(short[:32], long[:32])
    assert torch.equal(tables.upto(32)[0], short)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="rope kind: 'spiral'"):
        inverse_frequencies(RopeConfig(THETA, "spiral", DIM, False), MAX_POSITION, 1)
