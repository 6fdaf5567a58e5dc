"""Tensor parallelism for a Hugging Face model that is already in memory: its linear layers become shards.

The model stays what it was, with its own attention, cache and `generate`; every rank runs it on the same
inputs. q, k, v, gate and up keep this rank's rows, o and down this rank's columns and sum over the ranks, so
a block exchanges twice. Embedding and head stay whole. `fastattn.load` does more: it fuses layers, shards the
vocabulary, and knows schedules and policies that reach beyond a layer.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..collectives.exchange import Lane, agree
from ..collectives.policy import Sum
from ..collectives.steps import Exchange
from ..collectives.sums import Partial
from ..ops import linear
from ..parallel import shard
from ..parallel.group import ranks_of
from ..parallel.plan import with_item_bytes
from ..parallel.policies import parse
from ..quant import packed
from ..quant.cuts import take
from ..spec import Point, Shard, TPGroup, UnsupportedError

M = TypeVar("M", bound=nn.Module)
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


class _Dims(NamedTuple):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def parallelize(model: M, tp: str | TPGroup | None = "auto", sync: str = "exact") -> M:
    """Replaces the linear layers of ``model``'s blocks, in place, by this rank's shards; returns it.

    Args:
        model: a dense Llama, Mistral, Qwen2 or Qwen3 causal model of transformers, the same on all ranks.
        tp: as for `fastattn.load`.
        sync: how o and down are summed: exact, direct, star or compressed (`parallel.policies`).

    Raises ValueError or UnsupportedError, with the model unchanged; `SyncError` when the ranks differ.
    Inference only: the shards are not parameters.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in _FAMILIES:
        raise UnsupportedError(f"model: of type {family!r}, expected one of {', '.join(_FAMILIES)}")
    blocks = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(blocks, nn.Module):
        what = type(model).__name__
        raise UnsupportedError(f"model: {what} has no model.layers, expected a causal model")
    weights = next(model.parameters())
    parsed, schedule = parse(sync)
    policy = with_item_bytes(parsed, weights.dtype.itemsize)
    if not isinstance(policy, Sum) or schedule.name != "plain":
        raise UnsupportedError(
            f"sync: {sync!r} reaches beyond one layer; here exact, direct, star and compressed can be used, "
            "with fastattn.load all others"
        )
    for name, layer in _linears(blocks):
        if type(layer) is not nn.Linear:
            raise UnsupportedError(f"model: {name} is a {type(layer).__name__}, expected a dense nn.Linear")
        if layer.weight.dtype not in packed.FLOATS:
            accepted = ", ".join(map(str, packed.FLOATS))
            raise UnsupportedError(f"model: {name} is of {layer.weight.dtype}, expected one of {accepted}")
    g = ranks_of(tp, weights.device)
    dims = _dims(config)
    mine = shard.plan(dims, g.world, g.weights)[g.rank]
    reasons = policy.reasons(Point(0, "attn", "prefill"), 1, dims.hidden_size, weights.dtype, g)
    if reasons:
        raise UnsupportedError(f"sync: {'; '.join(reasons)}")
    agree(g, "the model", _digest(model))
    agree(g, "the sync policy", sync.encode())
    cuts = {
        "q_proj": shard.q_rows(mine, dims),
        "k_proj": shard.kv_rows(mine, dims),
        "v_proj": shard.kv_rows(mine, dims),
        "o_proj": shard.o_columns(mine, dims),
        "gate_proj": shard.ffn_rows(mine, dims),
        "up_proj": shard.ffn_rows(mine, dims),
        "down_proj": shard.ffn_columns(mine, dims),
    }
    for name, layer in list(_linears(blocks)):
        parent, _, leaf = name.rpartition(".")
        row_parallel = leaf in ("o_proj", "down_proj")
        where = f"layer {name}"
        part = (
            RowParallel(layer, cuts[leaf], g, policy, where)
            if row_parallel
            else ColumnParallel(layer, cuts[leaf])
        )
        setattr(blocks.get_submodule(parent), leaf, part)
    for block in blocks.children():
        block.get_submodule("self_attn").num_key_value_groups = len(mine.q_heads) // len(mine.kv_heads)  # type: ignore[assignment]
    return model


class ColumnParallel(nn.Module):
    """This rank's rows of a matrix."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, cut: Shard) -> None:
        super().__init__()
        self.register_buffer("weight", _owned(take(layer.weight, cut.out, 0)))
        bias = None if layer.bias is None else shard.cut_vector(layer.bias, cut.out)
        self.register_buffer("bias", None if bias is None else _owned(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., rows of this rank)."""
        return _apply(x, self.weight, self.bias)


class RowParallel(nn.Module):
    """This rank's columns of a matrix; the ranks' partial results are summed, then the bias is added."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, cut: Shard, g: TPGroup, policy: Sum, where: str) -> None:
        super().__init__()
        self.register_buffer("weight", _owned(take(layer.weight, cut.inn, 1)))
        self.register_buffer("bias", None if layer.bias is None else _owned(layer.bias))
        self._group, self._policy, self._where = g, policy, where

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns of this rank) to (..., out), the same bits on every rank."""
        g, out = self._group, self.weight.shape[0]
        if g.world == 1:
            return _apply(x, self.weight, self.bias)
        rows = Partial(x.shape[:-1].numel(), out, x.dtype, lambda: _apply(x, self.weight, None).view(-1, out))
        total = Exchange(self._policy.steps(Lane(g, self._where), rows)).wait()
        total = total if self.bias is None else total + self.bias
        return total.view(*x.shape[:-1], out)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return linear(x.flatten(0, -2), packed.dense(weight, bias)).unflatten(0, x.shape[:-1])


def _owned(x: Tensor) -> Tensor:
    """A copy, so that the whole tensor it was cut from can be freed."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def _linears(blocks: nn.Module) -> list[tuple[str, Any]]:
    """Every projection of the blocks, by its name within them."""
    return [(name, m) for name, m in blocks.named_modules() if name.endswith("_proj")]


def _dims(config: Any) -> _Dims:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return _Dims(config.vocab_size, config.hidden_size, config.intermediate_size, heads, kv_heads, head_dim)


def _digest(model: nn.Module) -> bytes:
    """Of names, shapes, types and the first values of all parameters."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        first = p.detach().flatten()[:64].cpu().double().numpy().tobytes()
        found.update(f"{name} {tuple(p.shape)} {p.dtype}".encode() + first)
    return found.digest()
