"""Small random quantized checkpoints, as published: config, tensors of a format, some layers left dense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.builders import save_hf
from tests.quant.stored import Spec, store


def config(spec: Spec) -> dict[str, Any]:
    """The quantization config of a checkpoint of this kind."""
    if spec.kind == "gptq":
        form = {"v1": "gptq", "v2": "gptq_v2"}[spec.zeros]
        return {
            "quant_method": "gptq", "bits": spec.bits, "group_size": spec.group_size, "sym": spec.symmetric,
            "desc_act": spec.act_order, "checkpoint_format": form, "damp_percent": 0.01, "lm_head": False,
        }  # fmt: skip
    if spec.kind == "awq":
        return {
            "quant_method": "awq", "bits": 4, "group_size": spec.group_size, "zero_point": True,
            "version": "gemm", "modules_to_not_convert": None,
        }  # fmt: skip
    channel = spec.group_size == -1
    weights = {
        "num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, "dynamic": False,
        "group_size": None if channel else spec.group_size, "strategy": "channel" if channel else "group",
        "actorder": "group" if spec.act_order else None, "observer": "minmax",
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "quantization_status": "compressed", "kv_cache_scheme": None,
    }  # fmt: skip


def linears(model: Any, *, head: bool = False) -> list[str]:
    """The matrices that quantizers take, without ".weight"."""
    names = [n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim == 2]
    return [n for n in names if "embed" not in n and (head or n != "lm_head")]


Order = Callable[[str, int], "Tensor | None"]  # g_idx of a matrix by name and columns; None: random


def save_quantized(
    model: Any,
    directory: Path,
    spec: Spec,
    *,
    dense: Iterable[str] = (),
    head: bool = False,
    order: Order = lambda name, inn: None,
    shards: int = 1,
) -> dict[str, Tensor]:
    """Replaces the model's linear layers by random quantized ones and writes them; returns all values.

    ``dense``: parts of names of layers that stay as they are. The values, float64 by Hugging Face's names,
    also become the model's, so that it can serve as the peer.
    """
    save_hf(model, directory)
    (directory / "model.safetensors").unlink()
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    values = {n: t.double() for n, t in tensors.items()}
    for i, name in enumerate(linears(model, head=head)):
        if any(part in name for part in dense):
            continue
        out, inn = tensors.pop(name + ".weight").shape
        stored = store(spec, out, inn, seed=i, g_idx=order(name, inn))
        tensors |= {f"{name}.{n}": t.contiguous() for n, t in stored.tensors.items()}
        values[name + ".weight"] = stored.values
    model.load_state_dict({n: v.float() for n, v in values.items()})
    write(directory, tensors, shards)
    settings = json.loads((directory / "config.json").read_text())
    settings["quantization_config"] = config(spec)
    (directory / "config.json").write_text(json.dumps(settings))
    return values


def write(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One safetensors file, or several with an index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    names = {n: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(tensors)}
    for file in set(names.values()):
        save_file({n: t for n, t in tensors.items() if names[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def rewrite(directory: Path, **changes: Any) -> None:
    """Changes the tensors of a saved checkpoint; None removes one."""
    tensors = load_file(directory / "model.safetensors") | changes
    write(directory, {k: v for k, v in tensors.items() if v is not None})


def head_order(heads: int, kv_heads: int, head_dim: int, group_size: int, seed: int = 0) -> Tensor:
    """``g_idx`` of an o_proj whose act-order stays inside heads, alike for all heads of one KV head."""
    rng = torch.Generator().manual_seed(seed)
    inside = [torch.randperm(head_dim, generator=rng) for _ in range(kv_heads)]
    each = heads // kv_heads
    order = torch.cat([h * head_dim + inside[h // each] for h in range(heads)])
    g_idx = torch.empty(heads * head_dim, dtype=torch.int32)
    g_idx[order] = torch.arange(heads * head_dim, dtype=torch.int32) // group_size
    return g_idx
