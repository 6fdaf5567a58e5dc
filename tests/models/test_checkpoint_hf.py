"""Hugging Face directories: every tensor, every cut, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastattn.models.checkpoint import Checkpoint, open_checkpoint
from fastattn.models.config import tensor_shapes
from fastattn.spec import CheckpointError, Cut, Shard
from tests.models.builders import FAMILIES, hf_model, save_hf


def whole(checkpoint: Checkpoint, name: str) -> Shard:
    out, inn = checkpoint.shape(name)
    return Shard(0, 1, Cut(out), Cut(inn))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def rewrite(directory: Path, **changes: Any) -> None:
    """Changes the tensors of a saved checkpoint; None removes one."""
    tensors = load_file(directory / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")


@pytest.mark.parametrize("shards", [1, 3], ids=["one-file", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = hf_model(family, dtype=dtype, **biases)
    save_hf(model, tmp_path, shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    checkpoint = open_checkpoint(tmp_path)
    expected = model.state_dict()
    assert set(tensor_shapes(checkpoint.config)) == set(expected)
    assert checkpoint.config.dtype == dtype
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        if tensor.ndim == 2:
            weight = checkpoint.load(name, whole(checkpoint, name))
            assert weight.format == "dense"
            assert torch.equal(weight.tensors["weight"], tensor)
        else:
            assert torch.equal(checkpoint.tensor(name, dtype), tensor)


CUTS = {
    "whole": Cut(64),
    "span": Cut(64, ((5, 37),)),
    "spans": Cut(64, ((40, 64), (0, 3), (0, 3))),
    "index": Cut(64, order=torch.tensor([63, 0, 17, 17, 2])),
    "empty": Cut(64, ((7, 7),)),
}


def selected(cut: Cut) -> torch.Tensor:
    if cut.order is not None:
        return cut.order
    return torch.cat([torch.arange(lo, hi) for lo, hi in cut.spans or ((0, cut.size),)])


@pytest.mark.parametrize("inn", CUTS, ids=CUTS)
@pytest.mark.parametrize("out", CUTS, ids=CUTS)
def test_cuts(out: str, inn: str, saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    name = "model.layers.1.self_attn.o_proj.weight"
    stored = load_file(saved / "model.safetensors")[name]
    weight = checkpoint.load(name, Shard(0, 2, CUTS[out], CUTS[inn]))
    expected = stored[selected(CUTS[out])][:, selected(CUTS[inn])]
    assert weight.shape == tuple(expected.shape)
    assert torch.equal(weight.tensors["weight"], expected)
    kept = weight.tensors["weight"].untyped_storage()
    assert kept.nbytes() == expected.numel() * 4, "the shard keeps memory it does not need"


@pytest.mark.parametrize("cut", CUTS, ids=CUTS)
def test_vector_cuts(cut: str, saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")["model.norm.weight"]
    found = open_checkpoint(saved).tensor("model.norm.weight", torch.float64, CUTS[cut])
    assert torch.equal(found, stored[selected(CUTS[cut])].double())


@pytest.mark.parametrize(
    "cut",
    [Cut(63), Cut(64, ((0, 65),)), Cut(64, ((-1, 3),)), Cut(64, ((9, 3),)), Cut(64, order=torch.tensor([64])),
     Cut(64, order=torch.tensor([0.5])), Cut(64, ((0, 1),), torch.tensor([0]))],
    ids=["size", "past", "negative", "backwards", "index", "float", "both"],
)  # fmt: skip
def test_bad_cuts(cut: Cut, saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    with pytest.raises(ValueError, match="out"):
        checkpoint.load("model.layers.0.self_attn.q_proj.weight", Shard(0, 1, cut, Cut(64)))


def test_tied_head(tmp_path: Path) -> None:
    model = hf_model("qwen3", tie_word_embeddings=True)
    save_hf(model, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.tie_embeddings
    head = checkpoint.load("lm_head.weight", whole(checkpoint, "lm_head.weight")).tensors["weight"]
    assert torch.equal(head, model.get_output_embeddings().weight)


def test_a_stored_head_that_is_not_the_embedding(tmp_path: Path) -> None:
    save_hf(hf_model("llama", tie_word_embeddings=True), tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, **{"lm_head.weight": embedding.clone()})
    checkpoint = open_checkpoint(tmp_path)
    head = checkpoint.load("lm_head.weight", whole(checkpoint, "lm_head.weight")).tensors["weight"]
    assert torch.equal(head, embedding)
    other = embedding.clone()
    other[5, 5] += 1
    for changed in (other, embedding.half(), embedding[1:].clone()):
        rewrite(tmp_path, **{"lm_head.weight": changed})
        with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from the embedding"):
            open_checkpoint(tmp_path)


def test_fingerprint(copied: Path, saved: Path) -> None:
    first = open_checkpoint(saved).fingerprint()
    assert open_checkpoint(copied).fingerprint() == first  # whatever the folder is called
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 2e-5}))
    assert open_checkpoint(copied).fingerprint() != first
    (copied / "config.json").write_text(json.dumps(config))
    rewrite(copied, **{"model.norm.weight": torch.ones(64, dtype=torch.float16)})
    assert open_checkpoint(copied).fingerprint() != first


def test_fingerprint_knows_a_fine_tune(copied: Path) -> None:
    """Same tables and sizes, other weights."""
    name = "model.layers.0.mlp.down_proj.weight"
    checkpoint = open_checkpoint(copied)
    values = checkpoint.load(name, whole(checkpoint, name)).tensors["weight"]
    tables, fingerprints = [], []
    for scale in (1.0, 1.01):
        rewrite(copied, **{name: values * scale})
        tables.append(open_checkpoint(copied)._table())  # noqa: SLF001
        fingerprints.append(open_checkpoint(copied).fingerprint())
    assert tables[0] == tables[1]
    assert fingerprints[0] != fingerprints[1]


def test_a_safetensors_file_stands_for_its_directory(saved: Path) -> None:
    assert open_checkpoint(saved / "model.safetensors").path == str(saved)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"model.layers.1.mlp.up_proj.weight": None}, r"mlp.up_proj.weight: is missing"),
    "shape": ({"model.norm.weight": torch.ones(63)}, r"norm.weight: has shape \(63,\), the config"),
    "dims": ({"model.norm.weight": torch.ones(1, 64)}, r"norm.weight: has shape \(1, 64\)"),
    "int32": ({"model.norm.weight": torch.ones(64, dtype=torch.int32)}, r"norm.weight: has dtype I32"),
    "float64": ({"model.norm.weight": torch.ones(64, dtype=torch.float64)}, r"norm.weight: has dtype F64"),
    "float8": ({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}, r"has dtype F8_E4M3"),
    "bias": ({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, r"q_proj.bias: is not part of"),
    "head bias": ({"lm_head.bias": torch.ones(320)}, r"lm_head.bias: is not part of"),
    "norm bias": ({"model.norm.bias": torch.ones(64)}, r"model.norm.bias: is not part of"),
    "layers": ({"model.layers.2.mlp.up_proj.weight": torch.ones(160, 64)}, r"is not part of .* of 2 layers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED)
def test_refused_tensors(case: str, copied: Path) -> None:
    changes, reason = REFUSED[case]
    rewrite(copied, **changes)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(copied)


def test_old_rotary_buffers_are_ignored(copied: Path) -> None:
    rewrite(copied, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with pytest.raises(CheckpointError, match="no such tensor"):
        open_checkpoint(copied).shape("model.layers.0.self_attn.rotary_emb.inv_freq")


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickles_are_refused(suffix: str, copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors"):
        open_checkpoint(copied)
    (copied / f"pytorch_model.{suffix}").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(copied)
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(copied / f"pytorch_model.{suffix}")


SHARDED = {
    "escape": lambda m: m.update({"model.norm.weight": "../model.safetensors"}),
    "absolute": lambda m: m.update({"model.norm.weight": "/etc/passwd.safetensors"}),
    "windows": lambda m: m.update({"model.norm.weight": "..\\model.safetensors"}),
    "pickle": lambda m: m.update({"model.norm.weight": "pytorch_model.bin"}),
    "type": lambda m: m.update({"model.norm.weight": 3}),
    "gone": lambda m: m.update({"model.norm.weight": "model-00009-of-00003.safetensors"}),
    "elsewhere": lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]}),
    "missing": lambda m: m.pop("model.norm.weight"),
    "empty": lambda m: m.clear(),
}


@pytest.mark.parametrize("case", SHARDED, ids=SHARDED)
def test_hostile_index(case: str, tmp_path: Path) -> None:
    save_hf(hf_model("llama"), tmp_path, shards=3)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    SHARDED[case](index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


def test_shrunk_after_opening(copied: Path) -> None:
    checkpoint = open_checkpoint(copied)
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.norm\.weight"):
        checkpoint.tensor("model.norm.weight", torch.float32)


def test_unknown_names_and_wrong_kinds(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    with pytest.raises(CheckpointError, match="no such tensor"):
        checkpoint.tensor("model.nothing", torch.float32)
    with pytest.raises(ValueError, match="matrices"):
        checkpoint.load("model.norm.weight", Shard(0, 1, Cut(64), Cut(64)))


def test_places(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor a \.gguf"):
        open_checkpoint(tmp_path)
    other = tmp_path / "notes.txt"
    other.write_text("hello")
    with pytest.raises(CheckpointError, match=r"is not a \.gguf file"):
        open_checkpoint(other)
    with pytest.raises(CheckpointError, match=r"cannot be opened|no such file"):
        open_checkpoint("a\0b")
