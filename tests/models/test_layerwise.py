"""Layer by layer: the inputs of every linear layer, and the likelihoods, are those of the whole model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.config import tensor_shapes
from fastattn.models.dense import DenseWeights, deinterleave
from fastattn.models.layerwise import Layer, Sequences, layerwise_nll
from fastattn.models.perplexity import nll
from tests.models.builders import FAMILIES, hf_model, interleave, save_gguf, save_hf

CHUNKS = [[5, 77, 9, 130, 250, 31, 8, 19, 44] * 4, [17, 200, 3, 99] * 11]


def biased(family: str) -> dict[str, Any]:
    return {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}


def test_deinterleave_undoes_the_converter() -> None:
    rows = torch.randn(3 * 8, 5)
    assert torch.equal(deinterleave(torch.from_numpy(interleave(rows.numpy(), 3)), 3, 8), rows)
    partial_rotary = torch.cat((torch.arange(0, 8, 2), torch.arange(1, 8, 2), torch.arange(8, 12)))
    assert torch.equal(deinterleave(torch.arange(12), 1, 8), partial_rotary)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_weights_of_a_directory(family: str, tmp_path: Path) -> None:
    model = hf_model(family, **biased(family))
    weights = DenseWeights(open_checkpoint(save_hf(model, tmp_path)))
    expected = model.state_dict()
    assert set(tensor_shapes(weights.config)) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.tensor(name), tensor)
    layer = weights.tensors("model.layers.1.")
    assert torch.equal(layer["mlp.up_proj.weight"], expected["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("quant", ["F32", "Q4_1", "Q8_0"])
def test_dense_weights_of_a_gguf_file(quant: str, tmp_path: Path) -> None:
    model = hf_model("llama", tie_word_embeddings=True)
    values = save_gguf(model, tmp_path / "m.gguf", quant)
    weights = DenseWeights(open_checkpoint(tmp_path / "m.gguf"))
    assert not weights.config.rope.interleaved
    heads = {"q": model.config.num_attention_heads, "k": model.config.num_key_value_heads}
    for name, stored in values.items():
        expected = torch.from_numpy(stored)
        part = name.partition("self_attn.")[2][:1]
        if part in heads:  # as stored, so interleaved
            expected = expected.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(weights.tensor(name), expected), name


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_that_transformers_sees(family: str, tmp_path: Path) -> None:
    model = hf_model(family, **biased(family))
    weights = DenseWeights(open_checkpoint(save_hf(model, tmp_path)))
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(partial(_keep, seen.setdefault(name, [])))
    with torch.no_grad():
        for chunk in CHUNKS:
            model(torch.tensor([chunk]))
    with torch.inference_mode():
        sequences = Sequences(weights, CHUNKS)
        for i in range(weights.config.num_layers):
            prefix = f"model.layers.{i}."
            layer = Layer(weights.config, i, weights.tensors(prefix))
            for names, inputs, advance in (
                (("self_attn.q_proj", "self_attn.v_proj"), sequences.attention_inputs, None),
                (("self_attn.o_proj",), sequences.o_inputs, sequences.add_attention),
                (("mlp.gate_proj", "mlp.up_proj"), sequences.mlp_inputs, None),
                (("mlp.down_proj",), sequences.down_inputs, sequences.add_mlp),
            ):
                found = list(inputs(layer))
                for name in names:
                    for ours, theirs in zip(found, seen[prefix + name], strict=True):
                        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
                if advance is not None:
                    advance(layer)


def _keep(into: list[Tensor], _module: Any, inputs: tuple[Tensor, ...]) -> None:
    into.append(inputs[0][0])


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_equal_those_of_the_whole_model(family: str, tied: bool, tmp_path: Path) -> None:
    model = hf_model(family, tie_word_embeddings=tied, **biased(family))
    save_hf(model, tmp_path)
    called: list[None] = []
    weights = DenseWeights(open_checkpoint(tmp_path))
    found = layerwise_nll(weights, CHUNKS, lambda: called.append(None))
    torch.testing.assert_close(found, nll(fastattn.load(tmp_path), CHUNKS), atol=1e-5, rtol=1e-5)
    assert len(called) == weights.config.num_layers


def test_likelihoods_of_a_gguf_file_with_interleaved_rows(tmp_path: Path) -> None:
    save_gguf(hf_model("llama"), tmp_path / "m.gguf", "F32")
    found = layerwise_nll(DenseWeights(open_checkpoint(tmp_path / "m.gguf")), CHUNKS)
    expected = nll(fastattn.load(tmp_path / "m.gguf"), CHUNKS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
