"""`fastattn.parallelize`: a transformers model in memory, sharded in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.parallel.group import single
from fastattn.spec import UnsupportedError
from tests.models.builders import hf_model
from tests.parallel.ranks import Ranks

PROGRAM = Path(__file__).resolve().parent / "parallelize_rank.py"


@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_equals_the_model_it_was(world: int, tmp_path: Path) -> None:
    """Every family, uneven heads (4 query and 2 KV heads on 3 ranks), biases, exact and lossy sums."""
    with Ranks(PROGRAM, [], world, tmp_path) as ranks:
        assert set(ranks.wait(150).values()) == {0}, ranks.everything()
        assert all("equal" in ranks.out(r) for r in range(world))


@pytest.mark.parametrize("sync", ["fused_norm", "tiled", "dropped", "token_weave+exact"])
def test_what_reaches_beyond_a_layer_is_refused(sync: str) -> None:
    model = hf_model("llama")
    before = dict(model.named_parameters())
    with pytest.raises(UnsupportedError, match=r"sync: .* reaches beyond one layer"):
        fastattn.parallelize(model, tp=single(), sync=sync)
    assert dict(model.named_parameters()).keys() == before.keys()


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="model: of type None, expected one of llama"):
        fastattn.parallelize(torch.nn.Linear(3, 3), tp=single())
    decoder = hf_model("llama").model
    with pytest.raises(UnsupportedError, match=r"model: LlamaModel has no model\.layers, expected a causal"):
        fastattn.parallelize(decoder, tp=single())
    doubles = hf_model("llama").double()
    with pytest.raises(UnsupportedError, match=r"0\.self_attn\.q_proj is of torch.float64, expected one of"):
        fastattn.parallelize(doubles, tp=single())
    assert doubles(torch.arange(3)[None]).logits.dtype == torch.float64  # is what it was
    model = fastattn.parallelize(hf_model("llama"), tp=single())
    with pytest.raises(UnsupportedError, match=r"0\.self_attn\.q_proj is a ColumnParallel, expected a dense"):
        fastattn.parallelize(model, tp=single())
