"""ModelConfig out of a Hugging Face config.json, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..spec import MAX_LAYERS
from .config import (
    DTYPES,
    FAMILIES,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_POSITION,
    MAX_VOCAB,
    ROPE_KINDS,
    ModelConfig,
    RopeConfig,
    check_dynamic,
    check_heads,
    check_rotary,
    pad_id,
)
from .fields import Fields, read_json

CONFIG_LIMIT = 4 << 20  # bytes
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_LARGE = 1e9
_MIN_THETA = 1.001  # YaRN divides by log(theta)


def read_config(directory: Path) -> ModelConfig:
    """config.json, with the stop tokens of generation_config.json where there is one."""
    path = directory / "config.json"
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path, CONFIG_LIMIT) if generation_path.exists() else {}
    return parse_config(read_json(path, CONFIG_LIMIT), path, Fields(generation_path, generation))


def parse_config(values: Mapping[str, Any], path: Path, generation: Fields | None = None) -> ModelConfig:
    """The config of a supported family; a key that is missing or not understood is a `CheckpointError`."""
    f = Fields(path, values)
    family = f.string("model_type")
    if family not in FAMILIES:
        f.fail("model_type", f"is {family!r}, supported are {', '.join(FAMILIES)}")
    _check_architecture(f, family)
    act = f.string("hidden_act", "silu")
    if act not in ("silu", "swish"):
        f.fail("hidden_act", f"is {act!r}, only silu is supported")

    heads = f.integer("num_attention_heads", 1, MAX_HEADS)
    # Only the oldest Llama configs leave the KV heads out, and then every query head has its own.
    kv_heads = f.integer("num_key_value_heads", 1, heads, heads)
    if family != "llama" and "num_key_value_heads" not in values:
        f.fail("num_key_value_heads", "is missing")
    check_heads(f, "num_key_value_heads", heads, kv_heads)
    hidden = f.integer("hidden_size", 1, MAX_HIDDEN)
    head_dim = f.integer("head_dim", 1, MAX_HEAD_DIM, None)
    if head_dim is None:
        if family == "qwen3":
            f.fail("head_dim", "is missing")
        if hidden % heads:
            f.fail("head_dim", f"is missing and hidden_size {hidden} is not a multiple of {heads} heads")
        head_dim = hidden // heads
    layers = f.integer("num_hidden_layers", 1, MAX_LAYERS)
    max_position = f.integer("max_position_embeddings", 1, MAX_POSITION)
    vocab = f.integer("vocab_size", 1, MAX_VOCAB)
    attention_bias = f.flag("attention_bias", False) if family in ("llama", "qwen3") else False
    stops = generation if generation is not None and generation.has("eos_token_id") else f
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size", 1, MAX_HIDDEN),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number("rms_norm_eps", 0.0, 1.0),
        max_position=max_position,
        rope=_rope(f, head_dim, max_position),
        windows=_windows(f, family, layers),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=f.flag("mlp_bias", False) if family == "llama" else False,
        qk_norm=family == "qwen3",
        tie_embeddings=f.flag("tie_word_embeddings", False),
        bos_id=f.token_id("bos_token_id", vocab),
        eos_ids=stops.ids("eos_token_id", vocab),
        pad_id=pad_id(f, "pad_token_id", vocab),
        dtype=_dtype(f),
    )


def _check_architecture(f: Fields, family: str) -> None:
    names = f.values.get("architectures")
    if names is not None and names != [ARCHITECTURES[family]]:
        f.fail(
            "architectures",
            f"is {str(names)[:80]}, expected [{ARCHITECTURES[family]!r}] for a {family} model",
        )


def _dtype(f: Fields) -> torch.dtype:
    key = "dtype" if f.has("dtype") else "torch_dtype"
    name = f.string(key, "float32")
    if name not in DTYPES:
        f.fail(key, f"is {name[:40]!r}, supported are {', '.join(DTYPES)}")
    return DTYPES[name]


def _windows(f: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer: Mistral's holds for all, Qwen's for those `layer_types` names."""
    if family == "llama":
        return (None,) * layers
    # A window that is absent is transformers' default one, other than a window that is null.
    window = f.integer("sliding_window", 1, 1 << 31, None) if "sliding_window" in f.values else 4096
    if family == "mistral":
        return (window,) * layers
    if not f.flag("use_sliding_window", False):
        window = None
    types = f.values.get("layer_types")
    if types is None:
        full = f.integer("max_window_layers", 0, 1 << 31, 28) if window is not None else layers
        return tuple(window if i >= full else None for i in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        f.fail("layer_types", f"expected a list of {layers} layer types")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            f.fail(
                "layer_types", f"names {str(kind)[:40]!r}, supported are full_attention and sliding_attention"
            )
    if "sliding_attention" in types and window is None:
        f.fail("sliding_window", "is missing, but layer_types names sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope(f: Fields, head_dim: int, max_position: int) -> RopeConfig:
    r = f.table("rope_scaling" if f.values.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, dict) for value in r.values.values()):
        f.fail(r.prefix.rstrip("."), "differs between kinds of layers, which is not supported")
    kind = r.string("rope_type", None) or r.string("type", "default")
    if kind not in ROPE_KINDS:
        r.fail("rope_type", f"is {kind[:40]!r}, supported are {', '.join(ROPE_KINDS)}")
    if "mrope_section" in r.values:
        r.fail("mrope_section", "multimodal rotary embedding is not supported")
    theta = r.number("rope_theta", _MIN_THETA, 1e15, None)
    if theta is None:
        theta = f.number("rope_theta", _MIN_THETA, 1e15, 10000.0)
    for fields in (r, f):
        if fields.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            fields.fail("partial_rotary_factor", "partial rotary embedding is not part of this family")
    check_rotary(f, "head_dim", head_dim, head_dim)
    original = f.integer("original_max_position_embeddings", 2, MAX_POSITION, None)
    if original is None:
        original = r.integer("original_max_position_embeddings", 2, MAX_POSITION, max_position)
    params: dict[str, float | list[float]] = {}
    if kind != "default":
        # YaRN and LongRoPE may leave the factor out: it is then the ratio of the two context lengths.
        ratio = max_position / original if kind in ("yarn", "longrope") else None
        factor = r.number("factor", 1e-3, _LARGE, None)
        if factor is None:
            factor = ratio
        if factor is None:
            r.fail("factor", "is missing")
        params["factor"] = factor
    if kind in ("llama3", "yarn", "longrope"):
        params["original_max_position_embeddings"] = float(original)
    elif kind == "dynamic":
        params["original_max_position_embeddings"] = float(max_position)
        check_dynamic(f, "head_dim", head_dim)
    if kind == "llama3":
        low = params["low_freq_factor"] = r.number("low_freq_factor", 1e-6, _LARGE)
        high = params["high_freq_factor"] = r.number("high_freq_factor", 1e-6, _LARGE)
        if high <= low:
            r.fail("high_freq_factor", f"is {high:g}, expected more than low_freq_factor, {low:g}")
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if r.has(key):
                params[key] = r.number(key, 1e-6, _LARGE)
        if r.has("truncate"):
            params["truncate"] = float(r.flag("truncate", True))
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            params[key] = r.numbers(key, head_dim // 2, 1e-6, _LARGE)
        if r.has("attention_factor"):
            params["attention_factor"] = r.number("attention_factor", 1e-6, _LARGE)
    return RopeConfig(theta, kind, head_dim, False, params)
