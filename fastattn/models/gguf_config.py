"""ModelConfig out of the metadata of a GGUF file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..spec import MAX_LAYERS
from .config import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_POSITION,
    MAX_VOCAB,
    ModelConfig,
    RopeConfig,
    check_heads,
    check_rotary,
    pad_id,
)
from .fields import Fields
from .gguf_header import GgufHeader

_FAMILIES = ("llama", "qwen2", "qwen3")  # llama.cpp converts Mistral to llama
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
_FACTORS = 1e-3, 1e9  # of a scaling
ROPE_FACTORS = "rope_freqs.weight"


def parse_metadata(path: Path, header: GgufHeader, rope_factors: np.ndarray | None) -> ModelConfig:
    """The config of a supported architecture; ``rope_factors`` are the values of the tensor `ROPE_FACTORS`.

    Biases and norms of heads are those whose tensors the file has.
    """
    f = Fields(path, header.fields)
    arch = f.string("general.architecture")
    if arch not in _FAMILIES:
        f.fail("general.architecture", f"is {arch[:40]!r}, supported are {', '.join(_FAMILIES)}")
    if f.integer("split.count", 0, 1 << 16, 0) > 1:
        f.fail(
            "split.count",
            "the model is split over several files; merge them first (llama-gguf-split --merge)",
        )
    if f.integer(f"{arch}.expert_count", 0, 1 << 16, 0):
        f.fail(f"{arch}.expert_count", "mixtures of experts are not supported")

    heads = f.integer(f"{arch}.attention.head_count", 1, MAX_HEADS)
    kv_heads = f.integer(f"{arch}.attention.head_count_kv", 1, heads, heads)
    check_heads(f, f"{arch}.attention.head_count_kv", heads, kv_heads)
    hidden = f.integer(f"{arch}.embedding_length", 1, MAX_HIDDEN)
    head_dim = f.integer(f"{arch}.attention.key_length", 1, MAX_HEAD_DIM, None)
    if head_dim is None:
        if hidden % heads:
            f.fail(f"{arch}.embedding_length", f"is {hidden}, not a multiple of the {heads} query heads")
        head_dim = hidden // heads
    if f.integer(f"{arch}.attention.value_length", 1, MAX_HEAD_DIM, head_dim) != head_dim:
        f.fail(f"{arch}.attention.value_length", f"differs from the key length, {head_dim}")
    layers = f.integer(f"{arch}.block_count", 1, MAX_LAYERS)
    max_position = f.integer(f"{arch}.context_length", 1, MAX_POSITION)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        f.fail("token_embd.weight", "is missing or not a matrix")
    vocab = f.integer(f"{arch}.vocab_size", 1, MAX_VOCAB, embedding.shape[0])
    window = f.integer(f"{arch}.attention.sliding_window", 0, 1 << 31, 0) or None
    first = {name.removeprefix("blk.0.") for name in header.tensors if name.startswith("blk.0.")}
    stops = [f.token_id(f"tokenizer.ggml.{kind}_token_id", vocab) for kind in ("eos", "eot", "eom")]
    return ModelConfig(
        family=arch,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=f.integer(f"{arch}.feed_forward_length", 1, MAX_HIDDEN),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=f.number(f"{arch}.attention.layer_norm_rms_epsilon", 0.0, 1.0),
        max_position=max_position,
        rope=_rope(f, arch, head_dim, max_position, rope_factors),
        windows=(window,) * layers,
        qkv_bias="attn_q.bias" in first or arch == "qwen2",
        o_bias="attn_output.bias" in first,
        mlp_bias="ffn_down.bias" in first,
        qk_norm="attn_q_norm.weight" in first or arch == "qwen3",
        tie_embeddings="output.weight" not in header.tensors,
        bos_id=f.token_id("tokenizer.ggml.bos_token_id", vocab),
        eos_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
        pad_id=pad_id(f, "tokenizer.ggml.padding_token_id", vocab),
        dtype=_DTYPES.get(embedding.type.name, torch.float32),
    )


def _rope(f: Fields, arch: str, head_dim: int, max_position: int, factors: np.ndarray | None) -> RopeConfig:
    theta = f.number(f"{arch}.rope.freq_base", 1.001, 1e15, 10000.0)
    key = f"{arch}.rope.dimension_count"
    dim = f.integer(key, 1, MAX_HEAD_DIM, head_dim)
    check_rotary(f, key, dim, head_dim)
    interleaved = arch == "llama"  # its converter permutes the rows of q and k for that style
    key, scale = f"{arch}.rope.scaling.type", f"{arch}.rope.scaling.factor"
    kind = f.string(key, "linear")  # as llama.cpp reads it, the older name of the factor too
    if kind not in ("none", "linear", "yarn"):
        f.fail(key, f"is {kind[:40]!r}, supported are none, linear and yarn")
    if kind == "linear" and not f.has(scale):
        scale = f"{arch}.rope.scale_linear"
    if kind == "linear" and f.number(scale, *_FACTORS, 1.0) == 1.0:
        kind = "none"
    params: dict[str, Any] = {}
    if factors is not None:
        # Llama 3's bands, evaluated by the converter: LongRoPE with the same divisors at every length.
        if kind != "none":
            f.fail(key, f"is {kind}, but the file also has the tensor {ROPE_FACTORS}")
        divisors = Fields(f.path, {ROPE_FACTORS: factors.tolist()}).numbers(ROPE_FACTORS, dim // 2, 1e-6, 1e9)
        params = {"factor": 1.0, "original_max_position_embeddings": float(max(max_position, 2)),
                  "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}  # fmt: skip
        return RopeConfig(theta, "longrope", dim, interleaved, params)
    if kind == "none":
        return RopeConfig(theta, "default", dim, interleaved)
    factor = params["factor"] = f.number(scale, *_FACTORS)
    if kind == "yarn":
        original = f.integer(
            f"{arch}.rope.scaling.original_context_length", 2, MAX_POSITION, max(max_position, 2)
        )
        params["original_max_position_embeddings"] = float(original)
        # llama.cpp multiplies its own 1 + 0.1 ln(factor) by this one
        extra = f.number(f"{arch}.rope.scaling.attn_factor", 1e-6, 1e9, 1.0)
        params["attention_factor"] = extra * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return RopeConfig(theta, kind, dim, interleaved, params)
