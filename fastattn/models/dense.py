"""Dense float32 weights of any checkpoint, a layer at a time, in the names and the order of Hugging Face."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..quant import packed
from ..spec import Cut, Shard
from .checkpoint import Checkpoint
from .config import tensor_shapes


class DenseWeights:
    """A checkpoint's weights, quantized ones dequantized, and its config as Hugging Face would have it.

    Rows of q and k that a GGUF file stores for interleaved rotary embedding return to their own order.
    """

    def __init__(self, checkpoint: Checkpoint[Any]) -> None:
        self._checkpoint = checkpoint
        self._stored = checkpoint.config
        self.config = replace(self._stored, rope=replace(self._stored.rope, interleaved=False))
        self._shapes = tensor_shapes(self.config)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """float32 tensors whose names begin with ``prefix``, by the rest of their names."""
        return {n.removeprefix(prefix): self.tensor(n) for n in self._shapes if n.startswith(prefix)}

    def tensor(self, name: str) -> Tensor:
        """float32, exact."""
        if len(self._shapes[name]) == 1:
            found = self._checkpoint.tensor(name, torch.float32)
        else:
            out, inn = self._shapes[name]
            found = packed.dequantize(self._checkpoint.load(name, Shard(0, 1, Cut(out), Cut(inn))))
        c = self._stored
        if c.rope.interleaved and ".self_attn.q_proj." in name:
            return deinterleave(found, c.num_heads, c.rope.rotary_dim)
        if c.rope.interleaved and ".self_attn.k_proj." in name:
            return deinterleave(found, c.num_kv_heads, c.rope.rotary_dim)
        return found


def deinterleave(rows: Tensor, heads: int, rotary_dim: int) -> Tensor:
    """Rows (heads * head_dim, ...) from rotary pairs (2i, 2i + 1) to pairs (i, i + rotary_dim / 2)."""
    by_head = rows.unflatten(0, (heads, -1))
    turned = by_head[:, :rotary_dim].unflatten(1, (rotary_dim // 2, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, by_head[:, rotary_dim:]), 1).flatten(0, 1)
