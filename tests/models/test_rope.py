"""Rotary tables against Hugging Face's, for every scaling."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastattn.memory.paged import PagedKvCache
from fastattn.models.config import RopeConfig
from fastattn.models.rope import RopeTables, inverse_frequencies
from fastattn.spec import KvStep

DIM, MAX_POSITION, THETA = 32, 128, 5e5
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": MAX_POSITION},
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


def steps(*chunks: tuple[int, ...]) -> list[KvStep]:
    """Forwards of new tokens of each sequence, one after the other."""
    cache = PagedKvCache(1, 200, 8, 1, DIM)
    return [cache.reserve(range(len(new)), new) for new in chunks]


def turned(tables: RopeTables, step: KvStep, lengths: list[int] | None = None) -> torch.Tensor:
    """cos and sin of each new token (total, DIM)."""
    cos, sin, rows = tables.of(step, lengths)
    return torch.cat((cos[rows], sin[rows]), -1)


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
    wanted = torch.cat((cos[0, :, : DIM // 2], sin[0, :, : DIM // 2]), -1)
    tables = RopeTables(RopeConfig(THETA, kind, DIM, False, params))
    torch.testing.assert_close(turned(tables, *steps((length,))), wanted, rtol=0, atol=2e-5)


def test_tables_grow_and_are_kept() -> None:
    tables = RopeTables(RopeConfig(THETA, "default", DIM, False))
    first, second, third = steps((100,), (156,), (1,))
    cos, _, rows = tables.of(first)
    assert rows is first.positions
    assert tables.of(second)[0] is cos
    assert len(tables.of(third)[0]) == 512


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_lengths_decide_not_the_batch_nor_the_chunks(name: str) -> None:
    tables = RopeTables(RopeConfig(THETA, name, DIM, False, SCALINGS[name]))
    lengths = [20, 150, 140, 60]
    alone = [turned(tables, *steps((n,))) for n in lengths]
    assert not torch.equal(alone[0], alone[1][:20])
    assert torch.equal(turned(tables, *steps(tuple(lengths))), torch.cat(alone))
    for step, lo, hi in zip(steps((15,) * 4, (5,) * 4), (0, 15), (15, 20), strict=True):
        assert torch.equal(turned(tables, step, lengths), torch.cat([a[lo:hi] for a in alone]))


def test_llama3s_divisors_out_of_a_gguf_file_make_one_table() -> None:
    same = [1 + i / 16 for i in range(DIM // 2)]
    params = SCALINGS["longrope"] | {"short_factor": same, "long_factor": same}
    step = steps((100, 20))[0]
    assert RopeTables(RopeConfig(THETA, "longrope", DIM, False, params)).of(step)[2] is step.positions


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="rope kind: 'spiral'"):
        inverse_frequencies(RopeConfig(THETA, "spiral", DIM, False), 1)
