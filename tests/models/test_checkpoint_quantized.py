"""Quantized Hugging Face directories: every matrix of every format, cuts, part-dense models, bad files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.config import tensor_shapes
from fastattn.quant import packed
from fastattn.spec import CheckpointError, Cut, Shard
from tests.models.builders import hf_model
from tests.models.damage import cuts, flips, use
from tests.models.quantized import rewrite, save_quantized
from tests.quant.stored import SPECS, Spec

ACT = Spec("gptq", act_order=True)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size in (32, -1)], ids=str)
def test_every_matrix(spec: Spec, tmp_path: Path) -> None:
    model = hf_model("qwen2", num_hidden_layers=1)
    values = save_quantized(model, tmp_path, spec, dense=("k_proj",), shards=3)
    checkpoint = open_checkpoint(tmp_path)
    for name in tensor_shapes(checkpoint.config):
        if values[name].ndim == 1:
            assert torch.equal(checkpoint.tensor(name, torch.float64), values[name])
            continue
        out, inn = checkpoint.shape(name)
        for cut in (Cut(inn), Cut(inn, ((32, 48),)), Cut(inn, order=torch.arange(inn - 1, -1, -1))):
            weight = checkpoint.load(name, Shard(0, 1, Cut(out, ((8, 24),)), cut))
            index = slice(*cut.spans[0]) if cut.spans else slice(None) if cut.order is None else cut.order
            found = packed.dequantize(weight, torch.float64)
            assert torch.equal(found, values[name][8:24][:, index]), name
        quantized = not any(part in name for part in ("embed", "lm_head", "k_proj"))
        assert (weight.format != "dense") == quantized
        scattered = quantized and spec.act_order and spec.group_size > 0
        assert (checkpoint.groups(name) is not None) == scattered


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gptq")
    save_quantized(hf_model("llama", num_hidden_layers=1), directory, ACT)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def set_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def test_names_of_autogptq(copied: Path) -> None:
    """quantize_config.json and a file named after bits and group size; biases that are zero."""
    rewrite(copied, **{DOWN + ".bias": torch.zeros(64, dtype=torch.float16)})
    expected = open_checkpoint(copied).load(DOWN + ".weight", Shard(0, 1, Cut(64), Cut(160)))
    config = json.loads((copied / "config.json").read_text())
    (copied / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "model.safetensors").rename(copied / "gptq_model-4bit-32g.safetensors")
    found = open_checkpoint(copied).load(DOWN + ".weight", Shard(0, 1, Cut(64), Cut(160)))
    assert torch.equal(packed.dequantize(found), packed.dequantize(expected))


def test_quantized_head(tmp_path: Path) -> None:
    values = save_quantized(hf_model("llama", num_hidden_layers=1), tmp_path, Spec("gptq", 8), head=True)
    head = open_checkpoint(tmp_path).load("lm_head.weight", Shard(0, 1, Cut(320), Cut(64)))
    assert head.format == "int8"
    assert torch.equal(packed.dequantize(head, torch.float64), values["lm_head.weight"])


def test_fingerprint_knows_the_format(copied: Path) -> None:
    first = open_checkpoint(copied).fingerprint()
    set_config(copied, checkpoint_format="gptq_v2")
    assert open_checkpoint(copied).fingerprint() != first


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no qzeros": ({"qzeros": None}, r"down_proj\.qzeros: is missing"),
    "no g_idx": ({"g_idx": None}, r"down_proj\.g_idx: is missing"),
    "both": ({"weight": torch.zeros(64, 160)}, r"down_proj\.weight: is there beside gptq's qweight"),
    "packed size": (
        {"qweight": torch.zeros(19, 64).int()},
        r"has shape \(19, 64\), expected \(20, 64\)",
    ),
    "groups": ({"scales": torch.ones(6, 64).half()}, r"scales: has shape \(6, 64\), expected \(5, 64\)"),
    "type": ({"qweight": torch.zeros(20, 64).short()}, "qweight: has dtype I16, expected I32"),
    "scale type": ({"scales": torch.ones(5, 64).int()}, "scales: has dtype I32, expected F32 or F16 or BF16"),
    "bias": ({"bias": torch.ones(64)}, r"down_proj\.bias: is not part of"),
    "other": ({"weight_packed": torch.zeros(64, 20).int()}, "weight_packed: belongs to no matrix"),
}
BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"scales": torch.full((5, 64), torch.nan).half()}, "scales: not finite"),
    "high": ({"g_idx": torch.full((160,), 5).int()}, r"g_idx: names groups 5\.\.5, expected 0\.\.4"),
    "low": ({"g_idx": torch.full((160,), -1).int()}, r"g_idx: names groups -1\.\.-1"),
    "uneven": ({"g_idx": torch.zeros(160).int()}, "g_idx: puts 160 columns into group 0, expected 32"),
}


def change(directory: Path, changes: dict[str, Any]) -> None:
    rewrite(directory, **{f"{DOWN}.{n}": t for n, t in changes.items()})


@pytest.mark.parametrize("case", BAD, ids=BAD)
def test_bad_tensors(case: str, copied: Path) -> None:
    changes, reason = BAD[case]
    change(copied, changes)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(copied)


@pytest.mark.parametrize("case", BAD_VALUES, ids=BAD_VALUES)
def test_bad_values(case: str, copied: Path) -> None:
    changes, reason = BAD_VALUES[case]
    change(copied, changes)
    checkpoint = open_checkpoint(copied)
    with pytest.raises(CheckpointError, match=rf"down_proj\.weight: {reason}"):
        checkpoint.load(DOWN + ".weight", Shard(0, 1, Cut(64), Cut(160)))


def test_act_order_that_the_config_denies(copied: Path) -> None:
    set_config(copied, desc_act=False)
    with pytest.raises(CheckpointError, match=r"down_proj.weight: g_idx: .* no act-order"):
        open_checkpoint(copied).load(DOWN + ".weight", Shard(0, 1, Cut(64), Cut(160)))


def test_no_config(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    del config["quantization_config"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="qweight: is quantized, but no config says how"):
        open_checkpoint(copied)


def test_tied_head_of_its_own(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    rewrite(copied, **{"lm_head.weight": None, "lm_head.qweight": tensors[DOWN + ".qweight"]})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head\.qweight: belongs to no matrix"):
        open_checkpoint(copied)


def test_awq_needs_multiples_of_8_rows(tmp_path: Path) -> None:
    spec = Spec("awq", symmetric=False)
    save_quantized(hf_model("llama", num_hidden_layers=1, intermediate_size=160), tmp_path, spec)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 164}))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight: 164 rows, AWQ packs multiples of 8"):
        open_checkpoint(tmp_path)


DAMAGED = [ACT, Spec("awq", symmetric=False), Spec("compressed-tensors", 8, 32, True, False)]


@pytest.mark.parametrize("spec", DAMAGED, ids=str)
def test_damaged_files(spec: Spec, tmp_path: Path) -> None:
    """Bits flipped anywhere, and files cut short: a CheckpointError or a load, nothing else."""
    save_quantized(hf_model("llama", num_hidden_layers=1, vocab_size=300), tmp_path, spec)
    assert use(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    data, text = file.read_bytes(), config.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for damaged in (*flips(data, header, 120, seed=1), *flips(data, len(data), 60, seed=2)):
        file.write_bytes(damaged)
        use(tmp_path)
    for damaged in cuts(data, header, 20, seed=3):
        file.write_bytes(damaged)
        assert not use(tmp_path)
    file.write_bytes(data)
    start = text.index(b"quantization_config")
    for damaged in flips(text[start:], len(text) - start, 150, seed=4):
        config.write_bytes(text[:start] + damaged)
        use(tmp_path)
