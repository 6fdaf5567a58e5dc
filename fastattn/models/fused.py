"""A decoder's half-blocks, or all its layers, as one native call on the CPU.

Between two sync points there is nothing for Python to decide, yet a decoded token of a small model makes
some 300 op calls, which together cost more than its arithmetic. `kernels.Decoder` keeps the checked
weights and runs the same kernels on the same arguments: bit for bit the result of the ops one by one
(llama.py), which serve every other case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch
from ..backends.cpu_ops import FLOATS, native_weight
from ..collectives.exchange import memories, traffic
from ..memory.paged import PagedKvCache
from ..native import kernels
from ..spec import KvCache, KvStep, PackedWeight, Phase, Point

if TYPE_CHECKING:
    from .llama import Attention, Decoder, Mlp, RmsNorm


class FusedDecoder:
    """The weights of ``decoder`` as the native kernels take them; needs `reasons_against` to be empty."""

    def __init__(self, decoder: Decoder) -> None:
        config, (first, _) = decoder.config, decoder.blocks[0]
        dtype, self.hidden, self.layers = decoder.embedding.dtype, config.hidden_size, len(decoder.blocks)
        self.dtype = dtype
        self.weights = kernels.Decoder(
            str(dtype).removeprefix("torch."), config.hidden_size, first.heads, first.kv_heads,
            config.head_dim, config.rope.interleaved, config.head_dim**-0.5,
            decoder.embedding.vocab_size, decoder.embedding.lo, _matrix(decoder.embedding.weight),
            _norm(decoder.norm),
        )  # fmt: skip
        for attention, mlp in decoder.blocks:
            self.weights.add_block(
                norm=_norm(attention.norm),
                qkv=[_matrix(w, attention.qkv.act) for w in attention.qkv.weights],
                q_norm=_norm(attention.q_norm),
                k_norm=_norm(attention.k_norm),
                o=_matrix(attention.o.weight, attention.o.act),
                left=-1 if attention.window is None else attention.window - 1,
                mlp_norm=_norm(mlp.norm),
                gate_up=[_matrix(w, mlp.gate_up.act) for w in mlp.gate_up.weights],
                down=_matrix(mlp.down.weight, mlp.down.act),
            )
        self.has_head = min(decoder.head.widths) > 0  # of every rank
        if self.has_head:
            self.weights.set_head(_matrix(decoder.head.weight, decoder.head.act))
        #: Of the ranks that share the sums of whole forwards.
        self.memory = memories.get(decoder.group.pg) if decoder.group.world > 1 else None

    def step(self, rows: int, cache: KvCache, step: KvStep, cos: Tensor, sin: Tensor) -> FusedStep | None:
        """One forward of ``rows`` packed rows; None where the ops have to run one by one."""
        if rows == 0 or dispatch.by_op():
            return None
        if not isinstance(cache, PagedKvCache) or cache.keys.dtype != self.dtype:
            return None
        if cache.keys.device.type != "cpu":
            return None
        native = kernels.DecoderStep(
            self.weights, cache.keys, cache.values, step.block_table, step.seqused, step.cu_seqlens,
            step.positions, step.slots, cos, sin,
        )  # fmt: skip
        return FusedStep(native, self, "prefill" if step.max_new > 1 else "decode")


class FusedStep:
    """One forward: half-block by half-block where a policy sums between them, or all of it."""

    def __init__(self, native: Any, decoder: FusedDecoder, phase: Phase) -> None:
        self._native, self._phase, self._memory = native, phase, decoder.memory
        self.has_head = decoder.has_head
        self._hidden, self._layers, self._dtype = decoder.hidden, decoder.layers, decoder.dtype

    def attention(self, layer: int, hidden: Tensor, out: Tensor | None) -> Tensor:
        """Normalised ``hidden`` (rows, hidden) to this rank's partial result; appends to the cache."""
        return _run(self._native.attention, hidden, out, layer)

    def mlp(self, layer: int, hidden: Tensor, out: Tensor | None) -> Tensor:
        """Normalised ``hidden`` (rows, hidden) to this rank's partial result."""
        return _run(self._native.mlp, hidden, out, layer)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (rows,) to normalised hidden states (rows, hidden). Sums are this rank's own, or those of
        the ranks that share memory.
        """
        out = torch.empty((ids.shape[0], self._hidden), dtype=self._dtype)
        return self._whole(self._native.forward, ids, out)

    def next_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (rows,) int64 to the likeliest token after each, (rows,) int64, where `forward` could be
        called; every rank gets them. -1 where the largest logit is NaN or infinite.
        """
        return self._whole(self._native.next_tokens, ids, torch.empty_like(ids))

    def _whole(self, call: Callable[..., None], ids: Tensor, out: Tensor) -> Tensor:
        ids, threads = ids.contiguous(), torch.get_num_threads()
        if self._memory is None:
            call(ids, out, threads)
        else:
            self._memory.within(partial(call, ids, out, threads), self._where)
            rows = torch.empty((ids.shape[0], self._hidden), dtype=self._dtype, device="meta")
            traffic.add("all_reduce", rows, 1 + 2 * self._layers)
        dispatch.calls["cpu", "decoder"] += 1
        return out

    def _where(self, operation: int) -> str:
        """What the ranks do in the ``operation``-th exchange of `_whole`."""
        if operation == 0:
            return "embedding"
        layer, half = divmod(operation - 1, 2)
        return (
            str(Point(layer, "mlp" if half else "attn", self._phase))
            if layer < self._layers
            else "next token"
        )


def reasons_against(decoder: Decoder) -> list[str]:
    """Why the ops of ``decoder`` have to run one by one; empty when `FusedDecoder` can be made."""
    reasons = []
    weights = [decoder.embedding.weight, decoder.head.weight, *_weights(decoder)]
    if any(t.device.type != "cpu" for w in weights for t in w.tensors.values()):
        reasons.append("weights are not on the CPU")
    if decoder.embedding.dtype not in FLOATS:
        reasons.append(f"dtype {decoder.embedding.dtype}")
    if decoder.embedding.weight.x_perm is not None:
        reasons.append("x_perm: columns of the embedding in another order")
    if any(mlp.align is not None for _, mlp in decoder.blocks):
        reasons.append("an exchange between the GEMMs of the MLP")
    if len({(a.heads, a.kv_heads) for a, _ in decoder.blocks}) != 1:
        reasons.append("layers with different numbers of heads")
    return reasons


def _run(call: Callable[..., None], x: Tensor, out: Tensor | None, *layer: int) -> Tensor:
    x = x.contiguous()
    result = torch.empty_like(x) if out is None or not out.is_contiguous() else out
    call(*layer, x, result, torch.get_num_threads())
    dispatch.calls["cpu", "decoder"] += 1
    return result if out is None or result is out else out.copy_(result)


def _weights(decoder: Decoder) -> list[PackedWeight]:
    pairs: list[tuple[Attention, Mlp]] = list(decoder.blocks)
    return [w for a, m in pairs for w in (*a.qkv.weights, a.o.weight, *m.gate_up.weights, m.down.weight)]


def _norm(norm: RmsNorm | None) -> tuple[Tensor, float] | None:
    return None if norm is None else (norm.weight.contiguous(), norm.eps)


def _matrix(w: PackedWeight, act: str = "") -> tuple[Any, ...]:
    bias = None if w.bias is None else w.bias.contiguous()
    x_perm = None if w.x_perm is None else w.x_perm.long().contiguous()
    return (*native_weight(w), w.shape[1], bias, act == "int8", x_perm)
