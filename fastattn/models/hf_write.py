"""Writing Hugging Face directories: config.json, safetensors shards and their index, the tokenizer.

A file appears under its name only when it is whole. A directory is a model only with config.json, which is
written last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..spec import CheckpointError
from .checkpoint import Checkpoint
from .config import ModelConfig, RopeConfig
from .fields import read_json
from .hf import HfCheckpoint
from .hf_config import ARCHITECTURES, CONFIG_LIMIT, parse_config

INDEX = "model.safetensors.index.json"
_UNFINISHED = ".unfinished"
# Beside config.json and the weights: what tokenizers and generation read.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def shard_name(number: int, count: int) -> str:
    """The file of shard ``number``, from 1, of ``count``."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not at all; OSError names it and the reason."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    held = {name: t.contiguous() for name, t in tensors.items()}
    try:
        _replace(path, lambda unfinished: save_file(held, str(unfinished), metadata={"format": "pt"}))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all; OSError names it and the reason."""
    _write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_index(directory: Path, shards: Sequence[str]) -> None:
    """The index of which tensors lie in which of the ``shards``, files of ``directory``."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    total = 0
    for shard in shards:
        path = directory / shard
        with safe_open(str(path), framework="pt") as file:
            places |= dict.fromkeys(file.keys(), shard)
        with path.open("rb") as raw:  # 8 bytes with the length of the header, the header, the tensors
            total += path.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write_companions(directory: Path, checkpoint: Checkpoint[Any]) -> None:
    """The tokenizer and what else belongs beside the weights: copied, or made of what a GGUF file holds."""
    if not isinstance(checkpoint, HfCheckpoint):
        for name, content in checkpoint.tokenizer().files().items():
            _write_text(directory / name, content)
        return
    for name in _COMPANIONS:
        source = Path(checkpoint.path) / name
        if source.exists():
            _replace(directory / name, partial(shutil.copyfile, source))


def config_values(checkpoint: Checkpoint[Any], config: ModelConfig) -> dict[str, Any]:
    """config.json of ``config``: the checkpoint's own, less what it says of quantization, or a new one."""
    if not isinstance(checkpoint, HfCheckpoint):
        return to_config_json(checkpoint.path, config)
    values = read_json(Path(checkpoint.path) / "config.json", CONFIG_LIMIT)
    if config.dtype != checkpoint.config.dtype:
        values["dtype" if "dtype" in values else "torch_dtype"] = str(config.dtype).removeprefix("torch.")
    return {k: v for k, v in values.items() if k not in ("quantization_config", "compression_config")}


def to_config_json(path: object, config: ModelConfig) -> dict[str, Any]:
    """config.json that reads back as ``config``; `CheckpointError` of ``path`` where none does."""
    # llama.cpp converts Mistral to llama, but Hugging Face's Llama has no window.
    windowed = config.family == "llama" and any(config.windows)
    family = "mistral" if windowed else config.family
    bias_key = "qkv_bias" if family == "qwen3" else "o_bias"
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": getattr(config, bias_key),
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
        "pad_token_id": config.pad_id,
        "rope_theta": config.rope.theta,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
    if config.rope.kind != "default":
        values["rope_scaling"] = {"rope_type": config.rope.kind, **_rope_params(config.rope)}
    if family != "llama":
        values["sliding_window"] = next((w for w in config.windows if w), None)
    if family in ("qwen2", "qwen3"):
        values["use_sliding_window"] = any(config.windows)
        values["max_window_layers"] = 0
    back = parse_config(values, Path(str(path)))
    differ = [f.name for f in fields(config) if getattr(back, f.name) != getattr(config, f.name)]
    if windowed:
        differ.remove("family")
    if differ:
        raise CheckpointError(path, f"has no config.json in Hugging Face's words: {', '.join(differ)}")
    return values


def _rope_params(rope: RopeConfig) -> dict[str, Any]:
    """Numbers and flags of the types that Hugging Face gives them."""
    params: dict[str, Any] = dict(rope.params)
    for key, kind in (("original_max_position_embeddings", int), ("truncate", bool)):
        if key in params:
            params[key] = kind(params[key])
    return params


def remove_unfinished(directory: Path) -> None:
    """Deletes what a run that was killed left half-written."""
    for path in directory.glob(f"*{_UNFINISHED}"):
        path.unlink()


def _write_text(path: Path, text: str) -> None:
    _replace(path, lambda unfinished: unfinished.write_text(text, "utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Calls ``write`` with another name, and renames once everything is on the disk."""
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        write(unfinished)
        unfinished.chmod(mode)  # safetensors makes files that only their owner may read
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
