"""Quantizing whole models: what is written, what it costs, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fastattn
from fastattn.models import calibration
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.config import tensor_shapes
from fastattn.models.dense import DenseWeights
from fastattn.models.layerwise import Layer, Sequences, layerwise_nll
from fastattn.models.perplexity import chunks, nll
from fastattn.models.quantize import quantize
from fastattn.parallel.act_order import head_order
from fastattn.quant.recipe import Recipe
from fastattn.spec import CheckpointError
from tests.models.builders import FAMILIES, hf_model, save_gguf, save_hf

TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:40_000]
SMALL: dict[str, Any] = {"samples": 6, "seqlen": 48}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", num_hidden_layers=3), tmp_path_factory.mktemp("model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def read_back(out: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Every tensor of a finished directory, by the index alone: no loader; matrices dequantized."""
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name: load_file(out / shard)[name] for name, shard in index.items()}
    found = {}
    for name, tensor in stored.items():
        stem, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = [stored[f"{stem}.{k}"] for k in ("qweight", "qzeros", "scales", "g_idx")]
            found[f"{stem}.weight"] = recipe.unpack(*parts).dequantize()
        elif kind in ("weight", "bias"):
            found[name] = tensor
    return found


RECIPES = [
    Recipe(act_order="none"),
    Recipe(bits=2, group_size=32, sym=False, act_order="global"),
    Recipe(bits=3, group_size=32, act_order="head", format="gptq_v2"),
    Recipe(bits=8, group_size=-1, sym=False),
    Recipe(bits=4, group_size=64, method="rtn", act_order="none", search=False),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.method}-{r.bits}-{r.group_size}-{r.act_order}")
def test_the_directory_holds_the_model(directory: Path, recipe: Recipe, tmp_path: Path) -> None:
    report = quantize(directory, tmp_path / "q", recipe, TEXT, **SMALL)
    dense = DenseWeights(open_checkpoint(directory))
    found = read_back(tmp_path / "q", recipe)
    assert set(found) == set(tensor_shapes(dense.config))
    for name, tensor in found.items():
        original = dense.tensor(name)
        if tensor.ndim == 2 and ".layers." in name:
            worst = {2: 0.8, 3: 0.35, 4: 0.2, 8: 0.02}[recipe.bits]
            assert (tensor - original).norm() < worst * original.norm(), name
            assert not torch.equal(tensor, original)
        else:
            assert torch.equal(tensor, original), name
    loaded = DenseWeights(open_checkpoint(tmp_path / "q"))
    assert all(torch.equal(loaded.tensor(name), tensor) for name, tensor in found.items())
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config.pop("quantization_config").items() >= {
        "quant_method": "gptq", "bits": recipe.bits, "group_size": recipe.group_size, "sym": recipe.sym,
        "desc_act": recipe.act_order in ("global", "head"), "checkpoint_format": recipe.format,
    }.items()  # fmt: skip
    assert config == json.loads((directory / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "q" / name).read_bytes() == (directory / name).read_bytes()
    assert not list((tmp_path / "q").glob("*.unfinished"))
    assert not (tmp_path / "q" / "quantize.json").exists()
    matrices = [v for n, v in found.items() if v.ndim == 2 and ".layers." in n]
    assert report.weights == sum(v.numel() for v in matrices)
    shards = sorted((tmp_path / "q").glob("*.safetensors"))
    stored = [
        t for s in shards for n, t in load_file(s).items() if re.search(r"qweight|qzeros|scales|g_idx", n)
    ]
    bits = 8 * sum(t.numel() * t.element_size() for t in stored)
    assert report.bits_per_weight == pytest.approx(bits / report.weights)
    assert report.nbytes == sum(s.stat().st_size for s in shards)
    assert report.dense.value > 1
    assert report.change.value == pytest.approx(report.quantized.value / report.dense.value - 1)


def test_groups_follow_act_order(directory: Path, tmp_path: Path) -> None:
    for order in ("none", "group", "global", "head"):
        quantize(directory, tmp_path / f"q{order}", Recipe(group_size=32, act_order=order), TEXT, **SMALL)
    held = {
        o: load_file(tmp_path / f"q{o}" / "model-00002-of-00004.safetensors")
        for o in ("none", "group", "global", "head")
    }
    for name in (n for n in held["none"] if n.endswith("g_idx")):
        trivial = torch.arange(held["none"][name].numel()).int() // 32
        assert torch.equal(held["none"][name], trivial)
        assert torch.equal(held["group"][name], trivial)
        assert not torch.equal(held["global"][name], trivial)
        # Heads of 16 hold no whole group of 32, so that nothing moves inside them.
        assert torch.equal(held["head"][name], trivial) == ("o_proj" in name)


@pytest.mark.parametrize("order", ["group", "global", "head"])
def test_what_is_written_runs(order: str, tmp_path: Path) -> None:
    """Kernels compute what the dequantized weights say; "global" alone makes o permute its input."""
    model = save_hf(hf_model("qwen3", head_dim=64, num_hidden_layers=1), tmp_path / "m")
    recipe = Recipe(group_size=32, act_order=order)
    report = quantize(model, tmp_path / "q", recipe, TEXT, **SMALL)
    loaded = fastattn.load(tmp_path / "q")
    weights = DenseWeights(open_checkpoint(tmp_path / "q"))
    ids = [[5, 77, 9, 130, 250, 31, 8, 19, 44] * 4]
    torch.testing.assert_close(nll(loaded, ids), layerwise_nll(weights, ids), atol=1e-4, rtol=1e-4)
    attention, mlp = loaded.decoder.blocks[0]
    assert (attention.o.weight.x_perm is None) == (order != "global")
    assert mlp.down.weight.x_perm is None
    g_idx = open_checkpoint(tmp_path / "q").groups("model.layers.0.self_attn.o_proj.weight")
    c = loaded.config
    if order == "head":
        assert head_order(g_idx, c.num_heads, c.num_kv_heads, c.head_dim) is not None
    elif order == "global":
        assert head_order(g_idx, c.num_heads, c.num_kv_heads, c.head_dim) is None
    else:
        assert g_idx is None
    assert report.tokens == calibration.EVAL_CHUNKS * 24


def test_gptq_beats_rounding(tmp_path: Path) -> None:
    """On a layer's own outputs: random weights leave perplexity to chance."""
    save_hf(hf_model("qwen2"), tmp_path / "m")
    for method in ("gptq", "rtn"):
        recipe = Recipe(bits=3, group_size=32, method=method, act_order="none")
        quantize(tmp_path / "m", tmp_path / method, recipe, TEXT, samples=40, seqlen=48)
    ids = chunks(open_checkpoint(tmp_path / "m").tokenizer(), TEXT[-20_000:], 48, 20)
    outputs = {}
    with torch.inference_mode():
        for name in ("m", "gptq", "rtn"):
            weights = DenseWeights(open_checkpoint(tmp_path / name))
            sequences = Sequences(weights, ids)
            for i in range(weights.config.num_layers):
                layer = Layer(weights.config, i, weights.tensors(f"model.layers.{i}."))
                sequences.add_attention(layer)
                sequences.add_mlp(layer)
            outputs[name] = torch.cat(sequences.residuals)
    errors = {m: float((outputs[m] - outputs["m"]).norm()) for m in ("gptq", "rtn")}
    assert errors["gptq"] < 0.85 * errors["rtn"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_its_biases_and_norms(family: str, tmp_path: Path) -> None:
    more = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    if family == "qwen3":
        more["head_dim"] = 32
    model = hf_model(family, dtype=torch.bfloat16, **more)
    quantize(save_hf(model, tmp_path / "m"), tmp_path / "q", Recipe(group_size=32), TEXT, **SMALL)
    found = read_back(tmp_path / "q", Recipe(group_size=32))
    for name, tensor in model.state_dict().items():
        if ".layers." not in name or tensor.ndim == 1:
            assert torch.equal(found[name], tensor), name


def test_a_gguf_file_gives_the_same_files_as_its_directory(tmp_path: Path) -> None:
    model = hf_model("llama")
    save_gguf(model, tmp_path / "m.gguf")
    recipe = Recipe(group_size=32, act_order="head")
    quantize(save_hf(model, tmp_path / "m"), tmp_path / "a", recipe, TEXT, **SMALL)
    quantize(tmp_path / "m.gguf", tmp_path / "b", recipe, TEXT, **SMALL)
    for path in (tmp_path / "a").glob("model*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    ours, theirs = (open_checkpoint(tmp_path / name) for name in ("b", "m.gguf"))
    assert replace(ours.config, rope=theirs.config.rope) == theirs.config
    ours, theirs = ours.tokenizer(), theirs.tokenizer()
    assert ours.encode(TEXT) == theirs.encode(TEXT)
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.chat(messages) == theirs.chat(messages)
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id, theirs.eos_ids)


@pytest.mark.parametrize("source", ["m", "m.gguf"])
def test_what_stays_dense_in_another_dtype(source: str, tmp_path: Path) -> None:
    model = hf_model("llama")
    save_hf(model, tmp_path / "m")
    save_gguf(model, tmp_path / "m.gguf")
    recipe = Recipe(group_size=32)
    quantize(tmp_path / source, tmp_path / "q", recipe, TEXT, **SMALL, dtype="bf16")
    assert open_checkpoint(tmp_path / "q").config.dtype == torch.bfloat16
    found = read_back(tmp_path / "q", recipe)
    for name, tensor in model.state_dict().items():
        if ".layers." not in name or tensor.ndim == 1:
            assert torch.equal(found[name], tensor.bfloat16()), name


def test_a_quantized_model_can_be_quantized_again(directory: Path, tmp_path: Path) -> None:
    """8 bits of 4-bit weights: read dequantized, and what config.json said of the first time is gone."""
    first, second = Recipe(group_size=32, act_order="global"), Recipe(bits=8, group_size=32)
    quantize(directory, tmp_path / "4", first, TEXT, **SMALL)
    quantize(tmp_path / "4", tmp_path / "8", second, TEXT, **SMALL)
    four, eight = (DenseWeights(open_checkpoint(tmp_path / name)) for name in "48")
    for name in tensor_shapes(four.config):
        a, b = four.tensor(name), eight.tensor(name)
        assert (a - b).norm() <= 0.01 * a.norm(), name
    config = json.loads((tmp_path / "8" / "config.json").read_text())
    assert (config["quantization_config"]["bits"], config["quantization_config"]["desc_act"]) == (8, False)


def test_other_directories_are_left_alone(directory: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(directory, tmp_path / "m")
    before = contents(copy)
    with pytest.raises(ValueError, match="is not empty and holds no unfinished quantization"):
        quantize(copy, copy, Recipe(), TEXT, **SMALL)
    assert contents(copy) == before
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="is a file, expected a directory"):
        quantize(directory, tmp_path / "file", Recipe(), TEXT, **SMALL)
    assert (tmp_path / "file").read_text() == "kept"


# ------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits: 5, expected one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size: 0, expected one of 32, 64, 128, -1"),
        ({"act_order": "heads"}, "act_order: 'heads', expected one of 'none', 'group', 'global', 'head'"),
        ({"format": "gptq_p"}, "format: 'gptq_p', expected one of 'gptq', 'gptq_v2'"),
        ({"method": "awq"}, "method: 'awq', expected one of 'gptq', 'rtn'"),
        ({"damp": 0.0}, "damp: 0.0, expected"),
        ({"method": "rtn", "act_order": "global"}, "act_order: 'global', but method 'rtn'"),
    ],
)
def test_recipes_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seqlen": 513}, "seqlen: 513, expected 4 to the model's context, 512"),
        ({"dtype": "int8"}, "dtype: 'int8', expected auto, float32"),
        ({"samples": 0}, "samples: 0, expected at least 1"),
        ({"samples": 5000}, "text: too short for 5000 sequences of 48 tokens"),
        ({"text": "short"}, "text: too short for 6 sequences"),
        ({"eval_text": "short"}, "eval_text: too short for 1 sequences"),
    ],
)
def test_texts_and_lengths_that_cannot_be(
    directory: Path, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(
            **{"model": directory, "out": tmp_path / "q", "recipe": Recipe(), "text": TEXT}
            | SMALL
            | arguments
        )
    assert not (tmp_path / "q").exists()


def test_matrices_that_do_not_fill_words_are_named(tmp_path: Path) -> None:
    model = save_hf(hf_model("llama", intermediate_size=100), tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"gate_proj.weight: has 100 out features, 4 bits need a multiple of 8"
    ):
        quantize(model, tmp_path / "q", Recipe(), TEXT, **SMALL)
    assert not (tmp_path / "q").exists()


def test_a_model_that_no_config_describes_is_refused_before_the_work(tmp_path: Path) -> None:
    save_gguf(hf_model("qwen3", head_dim=32), tmp_path / "m.gguf", fields={"qwen3.rope.dimension_count": 16})
    with pytest.raises(CheckpointError, match=r"no config\.json in Hugging Face's words: rope"):
        quantize(tmp_path / "m.gguf", tmp_path / "q", Recipe(group_size=32), TEXT, **SMALL)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad: float, tmp_path: Path) -> None:
    model = hf_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 7] = bad
    save_hf(model, tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.down_proj.weight: weight: holds values that are not"
    ):
        quantize(tmp_path / "m", tmp_path / "q", Recipe(), TEXT, **SMALL)


def test_evaluation_text_is_kept_out_of_calibration(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(directory)
    tokenizer = checkpoint.tokenizer()
    texts = calibration.cut_texts(tokenizer, checkpoint.config, TEXT, None, None, 48)
    end = len(TEXT) - len(TEXT) // 10
    seen = {tokenizer.decode(ids) for ids in texts.calibration}
    assert len(texts.calibration) == calibration.SAMPLES
    assert len(texts.evaluation) == calibration.EVAL_CHUNKS
    assert all(piece in TEXT[:end] for piece in seen)
    assert all(tokenizer.decode(ids) in TEXT[end:] for ids in texts.evaluation)
