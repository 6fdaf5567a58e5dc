"""A Llama of two layers with random weights, as files: what `fastattn report` loads and runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .hf_write import write_json, write_tensors

_HIDDEN, _FFN, _HEADS, _KV_HEADS, _LAYERS, _VOCAB, _GROUP = 256, 512, 4, 2, 2, 256, 64
_CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _VOCAB,
    "hidden_size": _HIDDEN, "intermediate_size": _FFN, "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float16",
}  # fmt: skip
_GPTQ = {
    "quant_method": "gptq", "bits": 4, "group_size": _GROUP, "sym": False, "desc_act": True,
    "checkpoint_format": "gptq", "lm_head": False,
}  # fmt: skip


def write_sample(directory: Path, *, quantized: bool) -> Path:
    """config.json, weights in float16 or in GPTQ's 4 bits with act-order, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    g = torch.Generator().manual_seed(0)
    kv = _HIDDEN // _HEADS * _KV_HEADS
    shapes = {"self_attn.q_proj": (_HIDDEN, _HIDDEN), "self_attn.k_proj": (kv, _HIDDEN)}
    shapes |= {"self_attn.v_proj": (kv, _HIDDEN), "self_attn.o_proj": (_HIDDEN, _HIDDEN)}
    shapes |= {
        "mlp.gate_proj": (_FFN, _HIDDEN),
        "mlp.up_proj": (_FFN, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _FFN),
    }
    tensors = {f"{name}.weight": _dense(_VOCAB, _HIDDEN, g) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = torch.ones(_HIDDEN).half()
    for layer in range(_LAYERS):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{norm}.weight"] = torch.ones(_HIDDEN).half()
        for name, shape in shapes.items():
            parts = _packed(*shape, g) if quantized else {"weight": _dense(*shape, g)}
            tensors |= {f"{at}{name}.{part}": t for part, t in parts.items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory / "model.safetensors", tensors)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    write_json(directory / "tokenizer.json", json.loads(tokenizer.to_str()))
    write_json(directory / "config.json", _CONFIG | ({"quantization_config": _GPTQ} if quantized else {}))
    return directory


def _dense(out: int, inn: int, g: torch.Generator) -> Tensor:
    return (torch.randn(out, inn, generator=g) / inn**0.5).half()


def _packed(out: int, inn: int, g: torch.Generator) -> dict[str, Tensor]:
    """Random words are valid GPTQ weights: eight 4-bit integers each, along the input or the output."""
    groups = inn // _GROUP

    def words(*shape: int) -> Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=g, dtype=torch.int64).to(torch.int32)

    scales = (torch.rand(groups, out, generator=g) + 0.5) / (5 * inn**0.5)
    g_idx = torch.randperm(inn, generator=g) // _GROUP
    return {
        "qweight": words(inn // 8, out), "qzeros": words(groups, out // 8), "scales": scales.half(),
        "g_idx": g_idx.to(torch.int32),
    }  # fmt: skip
