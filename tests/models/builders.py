"""Small random checkpoints of every family, as transformers and the gguf library write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEXT = (
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps. In the beginning there was a word,"
    " and the words were many: numbers like 1234 and 3.14, names, naïve cafés, and so on.\n"
)
_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
_EXTRA: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {"head_dim": 24},  # not hidden_size / heads
}


def hf_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A transformers model with random weights, biases and norms included."""
    config_class, model_class = _CLASSES[family]
    config = config_class(**{**_SIZES, **_EXTRA[family], **overrides})
    config.architectures = [model_class.__name__]
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norms around 1, matrices with outputs of the size of their inputs.
            norm = name.endswith("norm.weight") or "layernorm" in name
            parameter.copy_(1 + 0.1 * noise if norm else noise / max(parameter.shape[-1], 4) ** 0.5)
    return model.to(dtype)


def save_hf(model: Any, directory: Path, *, shards: int = 1, tokenizer: bool = True) -> Path:
    """Writes config.json, the safetensors files and a tokenizer; returns the directory."""
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    model.save_pretrained(directory, max_shard_size=size if shards == 1 else size // shards)
    if tokenizer:
        byte_level_tokenizer().save(str(directory / "tokenizer.json"))
        settings = {
            "bos_token": SPECIALS[0],
            "eos_token": {"content": SPECIALS[2]},
            "chat_template": CHAT_TEMPLATE,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def byte_level_tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE tokenizer trained on a few sentences, cut as GPT-2 does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([_TEXT], trainer)
    return core


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{parts[rest]}.{suffix}"
    return f"{parts[stem]}.{suffix}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order for interleaved rotary embedding."""
    paired = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Random bytes that are valid blocks of a K type, of any finite scales: (rows, bytes of a row)."""
    values, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // values, size), dtype=np.uint8)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    for at in places:
        scale = rng.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def quantize(matrix: np.ndarray, kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """The matrix in a ggml type; K types, which the library cannot write, get random blocks instead."""
    if kind.name.endswith("_K"):
        return random_blocks(kind, matrix.shape, seed)
    return gguf.quants.quantize(np.ascontiguousarray(matrix, np.float32), kind)


def save_gguf(
    model: Any,
    path: Path,
    quant: str = "F32",
    *,
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, str | float] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a transformers model as GGUF; returns the float32 values that its matrices hold, by HF's names.

    Matrices are of type ``quant``, vectors F32. Rows of q and k of llama and mistral come back, as they are
    stored, in interleaved order. ``extra`` adds F32 tensors by GGUF's names, ``fields`` metadata.
    """
    c = model.config
    arch = "llama" if c.model_type == "mistral" else c.model_type
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kind = GGMLQuantizationType[quant]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_vocab_size(c.vocab_size)
    if any(kind == "sliding_attention" for kind in getattr(c, "layer_types", None) or []):
        raise ValueError("a GGUF file has one window for all layers, this model has several")
    if c.model_type == "mistral" and c.sliding_window:
        writer.add_sliding_window(c.sliding_window)
    _write_tokenizer(writer)
    for key, value in (fields or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)
    values = {}
    for i, (name, parameter) in enumerate(model.state_dict().items()):
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        array = parameter.float().numpy()
        if arch == "llama" and ".q_proj" in name:
            array = interleave(array, c.num_attention_heads)
        if arch == "llama" and ".k_proj" in name:
            array = interleave(array, c.num_key_value_heads)
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
            values[name] = array
            continue
        raw = quantize(array, kind, seed=i)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=kind)
        values[name] = gguf.quants.dequantize(raw, kind).astype(np.float32).reshape(array.shape)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    state = json.loads(byte_level_tokenizer().to_str())
    tokens = [t for t, _ in sorted(state["model"]["vocab"].items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIALS else 1 for t in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
