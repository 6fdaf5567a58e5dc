"""What a Llama-family model is: sizes, rotary embedding, biases, windows, special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .fields import Fields

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

# Upper bounds of what a file may ask for: far above every published model, low enough that a hostile
# value cannot make us loop or allocate before it meets the shape of a tensor.
MAX_VOCAB = 1 << 24
MAX_HIDDEN = 1 << 20
MAX_HEADS = 1 << 14
MAX_HEAD_DIM = 1 << 12
MAX_POSITION = 1 << 24


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    ``params`` by ``kind``, with Hugging Face's names: linear ``factor``; dynamic ``factor``,
    ``original_max_position_embeddings``; llama3 these and ``low_freq_factor``, ``high_freq_factor``; yarn
    ``factor``, ``original_max_position_embeddings`` and optionally ``attention_factor``, ``beta_fast``,
    ``beta_slow``, ``mscale``, ``mscale_all_dim``, ``truncate`` (1.0 or 0.0); longrope ``factor``,
    ``original_max_position_embeddings``, ``short_factor`` and ``long_factor`` (rotary_dim / 2 numbers
    each) and optionally ``attention_factor``.
    """

    theta: float
    kind: str
    rotary_dim: int  # of the head's dimensions; the rest pass through
    interleaved: bool  # pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
    params: Mapping[str, float | list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder."""

    family: str  # one of FAMILIES
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int  # the file's number; `context` is how long sequences may be
    rope: RopeConfig
    windows: tuple[int | None, ...]  # of each layer; w: a query sees itself and the w - 1 keys before it
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    dtype: torch.dtype  # of the checkpoint's dense tensors

    @property
    def context(self) -> int:
        """Tokens that a sequence may have.

        Scaling by a factor extends the length that the model was trained on. For linear, dynamic and YaRN
        the file's number is often still that one; Llama 3's and LongRoPE's is the extended one.
        """
        if self.rope.kind not in ("linear", "dynamic", "yarn"):
            return self.max_position
        p: Any = self.rope.params
        trained = p.get("original_max_position_embeddings", self.max_position)
        return min(MAX_POSITION, max(self.max_position, int(trained * p["factor"])))

    def canonical(self) -> dict[str, Any]:
        """As JSON values, for fingerprints and reports."""
        values = asdict(self)
        values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every tensor the model needs; matrices are (out, in)."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for i in range(c.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (c.hidden_size,),
            "self_attn.q_proj.weight": (q, c.hidden_size),
            "self_attn.k_proj.weight": (kv, c.hidden_size),
            "self_attn.v_proj.weight": (kv, c.hidden_size),
            "self_attn.o_proj.weight": (c.hidden_size, q),
            "post_attention_layernorm.weight": (c.hidden_size,),
            "mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
            "mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
            "mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
        }
        if c.qkv_bias:
            layer |= {
                "self_attn.q_proj.bias": (q,),
                "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.bias": (kv,),
            }
        if c.o_bias:
            layer["self_attn.o_proj.bias"] = (c.hidden_size,)
        if c.mlp_bias:
            layer |= {f"mlp.{part}_proj.bias": (c.intermediate_size,) for part in ("gate", "up")}
            layer["mlp.down_proj.bias"] = (c.hidden_size,)
        if c.qk_norm:
            layer |= {f"self_attn.{part}_norm.weight": (c.head_dim,) for part in "qk"}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def pad_id(fields: Fields, key: str, vocab_size: int) -> int | None:
    """The padding token, which is only written back: an id outside the vocabulary, a converter's, is none."""
    found: int | None = fields.integer(key, -(1 << 63), 1 << 64, None)
    return found if found is not None and 0 <= found < vocab_size else None


def check_heads(fields: Fields, key: str, num_heads: int, num_kv_heads: int) -> None:
    """Grouped-query attention needs every KV head to serve the same number of query heads."""
    if num_heads % num_kv_heads:
        fields.fail(key, f"is {num_kv_heads}, expected a divisor of the {num_heads} query heads")


def check_rotary(fields: Fields, key: str, rotary_dim: int, head_dim: int) -> None:
    """Rotary dimensions come in pairs and within the head."""
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        fields.fail(key, f"is {rotary_dim}, expected an even number up to the head_dim, {head_dim}")


def check_dynamic(fields: Fields, key: str, rotary_dim: int) -> None:
    """Dynamic NTK scaling divides by rotary_dim - 2."""
    if rotary_dim <= 2:
        fields.fail(key, f"is {rotary_dim}, dynamic rotary scaling needs more than 2 rotary dimensions")
