"""Small tokenizers as the metadata of a GGUF file, and texts to try them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.gguf_tokenizer import build_tokenizer
from fastattn.models.tokenizer import Tokenizer
from tests.models.builders import CHAT_TEMPLATE, SPECIALS, byte_level_tokenizer

TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "naïve café, Straße, Ελληνικά, русский, हिन्दी, العربية",
    "日本語とEnglishが混ざる文。中文也可以。한국어",
    "😀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \ufeff\u200b",
    "def f(x: int) -> int:\n\treturn x ** 2  # square\n\n\nprint(f(3))\r\n",
    "   \t  \n\n   \n x",
    "I've we'll THEY'RE it's 'quoted' don''t",
    "1234567890 3.14159 1,000,000 x2y3",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|>text<|endoftext|>",
    "a" * 300 + "!?" * 50,
    "\x00\x01\x7f",
]


def config_of(vocab_size: int, **changes: Any) -> ModelConfig:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    flags = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tie_embeddings"), False)
    values: dict[str, Any] = {
        "family": "llama",
        "vocab_size": vocab_size,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "max_position": 64,
        "rope": RopeConfig(1e4, "default", 8, True),
        "windows": (None,),
        "bos_id": 0,
        "eos_ids": (2,),
        "pad_id": None,
        "dtype": torch.float32,
        **sizes,
        **flags,
    }
    return ModelConfig(**{**values, **changes})


def byte_level_fields(pre: str | None = "gpt-2") -> dict[str, Any]:
    model = json.loads(byte_level_tokenizer(340).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3 if t in SPECIALS else 1 for t in tokens], np.int32),
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    return fields if pre is None else {**fields, "tokenizer.ggml.pre": pre}


def built(fields: dict[str, Any], **changes: Any) -> Tokenizer:
    size = len(fields["tokenizer.ggml.tokens"] or "a")
    return build_tokenizer(Path("m.gguf"), fields, config_of(size, **changes))


WORDS = [
    "▁the",
    "▁quick",
    "▁brown",
    "▁fox",
    "he",
    "er",
    "in",
    "▁t",
    "▁q",
    "▁",
    "th",
    "ow",
    "wn",
    "ck",
    "▁▁",
    "the",
]


def sentencepiece_fields(**changes: Any) -> dict[str, Any]:
    """A vocabulary whose words can be merged from their letters, with scores by length."""
    tokens, types = ["<unk>", "<s>", "</s>"], [2, 3, 3]
    tokens += [f"<0x{b:02X}>" for b in range(256)]
    types += [6] * 256
    pieces = (
        {word[:n] for word in WORDS for n in range(1, len(word) + 1)}
        | set("abcdefghijklmnopqrstuvwxyz")
        | set(WORDS)
    )
    ordered = sorted(pieces, key=lambda p: (-len(p), p))
    tokens += ordered
    types += [1] * len(ordered)
    tokens.append("<tool>")
    types.append(4)
    scores = [0.0] * 259 + [-float(i) for i in range(len(ordered))] + [0.0]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
