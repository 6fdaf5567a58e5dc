"""Llamas with random weights, as Hugging Face directories: any size, for speed and for comparing backends."""

from __future__ import annotations

import re
import zlib
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from ..quant.grouped import trivial_g_idx
from . import hf_write
from .config import tensor_shapes
from .hf_config import parse_config

FORMS = ("fp16", "int4")
_SPECIALS = ("<s>", "</s>")


class RandomLlama(NamedTuple):
    """What ``random:LAYERSxHIDDEN[:int4]`` names; the other sizes follow Llama 7B's proportions."""

    layers: int
    hidden: int
    form: str = "fp16"  # of the weights; "int4": GPTQ with act-order, embedding and head in fp16
    queries_per_kv: int = 1  # query heads that share a KV head

    @property
    def group_size(self) -> int:
        """Columns of a quantized group: 128 where the model is not tiny."""
        return 128 if self.hidden % 128 == 0 else 32

    def config(self) -> dict[str, Any]:
        """config.json. ``32x4096`` are Llama 7B's: 32 heads of 128, intermediate 11008, 32000 tokens."""
        head_dim = next((d for d in (128, 64) if self.hidden >= 4 * d and self.hidden % d == 0), 32)
        multiple = -(-max(self.group_size, self.hidden // 16) // self.group_size) * self.group_size
        heads = self.hidden // head_dim
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16",
            "hidden_size": self.hidden, "intermediate_size": -(-8 * self.hidden // 3 // multiple) * multiple,
            "num_hidden_layers": self.layers, "num_attention_heads": heads,
            "num_key_value_heads": heads // self.queries_per_kv,
            "head_dim": head_dim, "vocab_size": min(32000, 8 * self.hidden), "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip
        if self.form == "int4":
            config["quantization_config"] = {
                "quant_method": "gptq", "bits": 4, "group_size": self.group_size, "sym": False,
                "desc_act": True, "checkpoint_format": "gptq_v2",
            }  # fmt: skip
        return config


def parse(text: str) -> RandomLlama | None:
    """The model that ``text`` names, None where it names none of these. Raises ValueError."""
    if not text.startswith("random:"):
        return None
    found = re.fullmatch(r"random:([1-9]\d*)x([1-9]\d*)(?::(\w+))?", text)
    made = RandomLlama(int(found[1]), int(found[2]), found[3] or "fp16") if found else None
    if made is None or made.hidden % 64 or made.form not in FORMS:
        raise ValueError(f"{text!r}, expected random:LAYERSxHIDDEN[:int4], HIDDEN a multiple of 64")
    return made


def write(made: RandomLlama, folder: Path, seed: int = 0) -> Path:
    """Writes config.json, the weights, a file for each layer, and a tokenizer of bytes; by ``seed`` alone."""
    config = made.config()
    folder.mkdir(parents=True, exist_ok=True)
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    specials = {"bos_token": _SPECIALS[0], "eos_token": _SPECIALS[1]}
    hf_write.write_json(folder / "tokenizer_config.json", specials)
    rng = torch.Generator().manual_seed(seed)
    shapes = tensor_shapes(parse_config(config, folder / "config.json"))
    parts = [list(names) for _, names in groupby(shapes, _layer)]
    shards = [hf_write.shard_name(i + 1, len(parts)) for i in range(len(parts))]
    for shard, part in zip(shards, parts, strict=True):
        tensors: dict[str, Tensor] = {}
        for name in part:
            tensors |= _tensors(made, name, shapes[name], rng)
        hf_write.write_tensors(folder / shard, tensors)
    hf_write.write_index(folder, shards)
    hf_write.write_json(folder / "config.json", config)
    return folder


def _layer(name: str) -> str:
    """The layer that a tensor is of, "" outside them."""
    return name.split(".")[2] if ".layers." in name else ""


def _tensors(made: RandomLlama, name: str, shape: tuple[int, ...], rng: torch.Generator) -> dict[str, Tensor]:
    """Norms around 1, matrices whose outputs are of the size of their inputs."""
    if len(shape) == 1:
        return {name: (1 + 0.1 * torch.randn(shape, generator=rng)).half()}
    if made.form == "fp16" or "layers" not in name:
        return {name: (torch.randn(shape, generator=rng) / shape[1] ** 0.5).half()}
    quantized = _gptq(shape[0], _order(name, shape[1], made.group_size), rng)
    return {name.removesuffix("weight") + part: t for part, t in quantized.items()}


def _order(name: str, inn: int, group_size: int) -> Tensor:
    """The group of each column, scattered: alike for matrices that read one input, as GPTQ makes them."""
    layer, part, _ = name.rsplit(".", 2)
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(part, part)
    rng = torch.Generator().manual_seed(zlib.crc32(f"{layer}.{first}".encode()))
    return trivial_g_idx(inn, group_size)[torch.randperm(inn, generator=rng)]


def _gptq(out: int, g_idx: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """4 bits (`fastattn.quant.gptq`). Any word is a valid one."""
    inn, groups = g_idx.numel(), int(g_idx.max()) + 1
    lowest, end = -(1 << 31), 1 << 31
    spread = (torch.rand(groups, out, generator=rng) + 0.25) / (8 * inn**0.5)
    return {
        "qweight": torch.randint(lowest, end, (inn // 8, out), generator=rng).int(),
        "qzeros": torch.randint(lowest, end, (groups, out // 8), generator=rng).int(),
        "scales": spread.half(),
        "g_idx": g_idx,
    }


def _byte_tokenizer() -> Tokenizer:
    """A token for each byte, and the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate((*_SPECIALS, *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIALS])
    return core
