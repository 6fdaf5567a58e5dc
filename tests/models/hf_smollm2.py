"""Hugging Face's Llama with the dequantized weights of the SmolLM2 GGUF, built without our reader."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def huggingface_model(path: Path) -> LlamaForCausalLM:
    """float32, in eval mode."""
    reader = gguf.GGUFReader(path)
    fields = {name: reader.fields[f"llama.{name}"].contents() for name in _FIELDS}
    config = LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=fields["block_count"],
        num_attention_heads=fields["attention.head_count"],
        num_key_value_heads=fields["attention.head_count_kv"],
        max_position_embeddings=fields["context_length"],
        rms_norm_eps=fields["attention.layer_norm_rms_epsilon"],
        rope_theta=fields["rope.freq_base"],
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        layer, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind in heads:  # llama.cpp pairs (2i, 2i + 1), Hugging Face (i, i + D / 2)
            paired = values.reshape(heads[kind], -1, 2, values.shape[-1])
            values = paired.swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{layer}." if layer else ""
        state[f"{prefix}{_NAMES[kind]}.weight"] = torch.from_numpy(np.array(values, dtype=np.float32))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model


_FIELDS = (
    "vocab_size",
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "attention.head_count_kv",
    "context_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
)
