"""config.json in every spelling, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models.fields import Fields, read_json
from fastattn.models.hf_config import parse_config, read_config
from fastattn.models.rope import inverse_frequencies
from fastattn.spec import CheckpointError
from tests.models.builders import FAMILIES, hf_model

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
PATH = Path("config.json")


def test_old_llama_defaults() -> None:
    config = parse_config({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, PATH)
    assert (config.num_kv_heads, config.head_dim) == (6, 16)
    assert (config.rope.theta, config.rope.kind, config.rope.rotary_dim) == (10000.0, "default", 16)
    assert config.windows == (None,) * 3
    assert (config.bos_id, config.eos_ids, config.pad_id) == (1, (2,), None)
    assert config.dtype == torch.float32
    flags = (config.rope.interleaved, config.tie_embeddings, config.qkv_bias, config.o_bias, config.qk_norm)
    assert not any(flags)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}},
    ],
    ids=["old", "v4", "v5"],
)
def test_rope_spellings(spelling: dict[str, Any]) -> None:
    rope = parse_config({**LLAMA, **spelling}, PATH).rope
    assert (rope.theta, rope.kind, dict(rope.params)) == (5e5, "linear", {"factor": 4.0})


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG = {
    "factor": 4.0,
    "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
}
ROPES = {
    "default": {},
    "linear": {"factor": 2.5},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-full": {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 20.0, "beta_slow": 2.0,
                  "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False},
    "longrope": LONG,
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES, ids=ROPES)
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_frequencies_equal_transformers(case: str, version: str) -> None:
    """What we read from a config gives the frequencies and the factor that transformers computes from it."""
    rope = {"rope_type": case.partition("-")[0], "rope_theta": 20000.0, **ROPES[case]}
    model = hf_model("llama", hidden_size=64, num_attention_heads=4, rope_parameters=dict(rope))
    values = json.loads(model.config.to_json_string())
    if version == "v4":
        values["rope_theta"] = values["rope_parameters"].pop("rope_theta")
        values["rope_scaling"] = values.pop("rope_parameters")
    config = parse_config(values, PATH)
    ours, factor = inverse_frequencies(config.rope, 64)
    theirs = model.model.rotary_emb
    assert torch.allclose(ours, theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_as_transformers_writes_them(family: str, tmp_path: Path) -> None:
    model = hf_model(family, num_hidden_layers=3)
    theirs = model.config
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    attention = model.model.layers[0].self_attn
    assert config.family == family
    assert config.head_dim == attention.head_dim
    assert config.qkv_bias == (attention.q_proj.bias is not None)
    assert config.o_bias == (attention.o_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm")
    windows = {"mistral": (24, 24, 24), "qwen2": (None, 16, 16)}.get(family, (None, None, None))
    assert config.windows == windows
    assert (config.bos_id, config.eos_ids) == (0, (2,))


def test_generation_config_names_the_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert read_config(tmp_path).eos_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1000]}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id: .*0 to 999"):
        read_config(tmp_path)


@pytest.mark.parametrize("none", [-1, [-1], [], None], ids=str)
def test_ids_that_mean_none(none: Any) -> None:
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), none)
    config = parse_config({**LLAMA, **ids, "pad_token_id": 1000}, PATH)  # padding: one past the vocabulary
    assert (config.bos_id, config.eos_ids, config.pad_id) == (None, (), None)
    assert parse_config({**LLAMA, "eos_token_id": [-1, 7], "pad_token_id": 3}, PATH).eos_ids == (7,)
    assert parse_config({**LLAMA, "pad_token_id": 3}, PATH).pad_id == 3


CONTEXTS = {
    "default": ({}, 2048),
    "llama3": ({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 2048),
    "longrope": ({**LONG, "original_max_position_embeddings": 512}, 2048),
    "linear": ({"factor": 2.5}, 5120),
    "dynamic": ({"factor": 2.0, "original_max_position_embeddings": 512}, 4096),
    "yarn": ({"factor": 4.0}, 8192),
    "yarn-named": ({"factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
    "yarn-extended": ({"factor": 4.0, "original_max_position_embeddings": 512}, 2048),
    "yarn-implied": ({"original_max_position_embeddings": 512}, 2048),
    "yarn-less": ({"factor": 2.0, "original_max_position_embeddings": 512}, 2048),
    "yarn-endless": ({"factor": 1e9}, 1 << 24),
}


@pytest.mark.parametrize("case", CONTEXTS)
def test_scaling_extends_the_context(case: str) -> None:
    params, context = CONTEXTS[case]
    config = parse_config({**LLAMA, "rope_scaling": {"rope_type": case.partition("-")[0], **params}}, PATH)
    assert (config.max_position, config.context) == (2048, context)


def test_qwen_layer_types_rule() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    values = {**QWEN2, "use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    assert parse_config(values, PATH).windows == (8, None, 8)
    off = {**QWEN2, "use_sliding_window": False, "sliding_window": 8}
    assert parse_config(off, PATH).windows == (None, None, None)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("given", [{}, {"sliding_window": None}, {"sliding_window": 8}], ids=str)
def test_windows_that_are_absent_or_null(family: str, given: dict[str, Any]) -> None:
    """As transformers fills them in: absent is 4096, and Qwen's lowest 28 layers have none."""
    values = {**QWEN2, "model_type": family, "head_dim": 16, "num_hidden_layers": 30, **given}
    values |= {"architectures": None, "use_sliding_window": True}
    values.pop("max_window_layers", None)
    window = given.get("sliding_window", 4096)
    full = 0 if family == "mistral" else 28
    assert parse_config(values, PATH).windows == (None,) * full + (window,) * (30 - full)


NAN = float("nan")
HOSTILE: list[tuple[str, Any]] = [
    ("model_type", "mamba"),
    ("model_type", None),
    ("model_type", ["llama"]),
    ("architectures", ["LlamaForSequenceClassification"]),
    ("hidden_act", "gelu"),
    ("vocab_size", 0),
    ("vocab_size", -5),
    ("vocab_size", 10**40),
    ("vocab_size", True),
    ("vocab_size", "1000"),
    ("vocab_size", 1000.0),
    ("hidden_size", 1 << 40),
    ("hidden_size", None),
    ("intermediate_size", {}),
    ("num_hidden_layers", 10**9),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 4),
    ("num_key_value_heads", 12),
    ("head_dim", 17),
    ("head_dim", -2),
    ("max_position_embeddings", 1 << 60),
    ("rms_norm_eps", NAN),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", 10**400),
    ("tie_word_embeddings", "no"),
    ("attention_bias", 1),
    ("eos_token_id", 1000),
    ("eos_token_id", [2, "3"]),
    ("bos_token_id", -7),
    ("torch_dtype", "float8_e4m3fn"),
    ("dtype", 16),
    ("rope_theta", 0),
    ("rope_theta", float("inf")),
    ("partial_rotary_factor", 0.5),
    ("rope_scaling", "linear"),
    ("rope_scaling.rope_type", {"rope_type": "spiral", "factor": 2.0}),
    ("rope_scaling.factor", {"type": "linear"}),
    ("rope_scaling.factor", {"type": "linear", "factor": "2"}),
    ("rope_scaling.factor", {"type": "dynamic", "factor": -1.0}),
    ("rope_scaling.low_freq_factor", {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}),
    ("rope_scaling.high_freq_factor", {**LLAMA3, "rope_type": "llama3", "high_freq_factor": 1.0}),
    ("rope_scaling.short_factor", {**LONG, "rope_type": "longrope", "short_factor": [1.0] * 7}),
    ("rope_scaling.long_factor", {**LONG, "rope_type": "longrope", "long_factor": [NAN] * 8}),
    ("rope_scaling.mrope_section", {"rope_type": "default", "mrope_section": [1, 2]}),
    ("rope_scaling", {"full_attention": {"rope_type": "default"}}),
]


@pytest.mark.parametrize(("key", "value"), HOSTILE, ids=[f"{k}={str(v)[:30]}" for k, v in HOSTILE])
def test_refused_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config({**LLAMA, key.partition(".")[0]: value}, PATH)
    assert caught.value.tensor == key
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps", "model_type"],
)  # fmt: skip
def test_missing_keys_are_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key}: is missing"):
        parse_config({k: v for k, v in LLAMA.items() if k != key}, PATH)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": NaN}',
        '{"a": Infinity}',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "\x00",
        "nul",
    ],
    ids=["empty", "list", "cut", "nan", "inf", "deep", "digits", "zero", "word"],
)
def test_bad_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError):
        read_json(path, 1 << 20)


def test_json_limits(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a": "' + b"x" * 100 + b'"}')
    with pytest.raises(CheckpointError, match="109 bytes"):
        read_json(path, 50)
    path.write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_json(path, 1 << 20)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path / "none.json", 1 << 20)


def test_fields_default_stands_for_null() -> None:
    f = Fields("file", {"a": None, "b": 3})
    assert f.integer("a", 1, 9, 5) == 5
    assert f.integer("b", 1, 9, 5) == 3
    with pytest.raises(CheckpointError, match="file: a: is missing"):
        f.integer("a", 1, 9)
