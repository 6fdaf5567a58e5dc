"""The Llama-family decoder: Llama 2 and 3, SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3.

A block is two half-blocks, attention and MLP. Each ends in a row-parallel GEMM whose partial results
a `SyncPolicy` sums over the ranks; between sync points a `Stream` carries the residual and the next
half-block's normalised input. With one rank the policy just adds.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .. import dispatch
from ..collectives.exact import Exact
from ..collectives.exchange import shares_memory
from ..memory.attend import attend, narrow
from ..ops import rms_norm, rotary, swiglu
from ..parallel.act_order import Align
from ..parallel.linear import ColumnLinear, RowLinear
from ..parallel.schedule import woven
from ..parallel.vocab import VocabParallelEmbedding, VocabParallelHead
from ..spec import (
    Epilogue,
    KvCache,
    KvStep,
    PackedWeight,
    Phase,
    Point,
    Schedule,
    Stream,
    SyncPolicy,
    TPGroup,
    Work,
)
from .config import ModelConfig
from .rope import RopeTables

if TYPE_CHECKING:
    from .fused import FusedDecoder, FusedStep


@dataclass(frozen=True)
class RmsNorm:
    """RMSNorm, with the residual added in the same pass when there is one."""

    weight: Tensor
    eps: float

    is_rms_norm: ClassVar[bool] = True  # for policies that normalise themselves

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(normalised, x + residual)."""
        normed, total = rms_norm(x, self.weight, self.eps, residual)
        return normed, x if residual is None else total


@dataclass(frozen=True)
class Attention:
    """Weights of an attention half-block, this rank's heads of it."""

    norm: RmsNorm
    qkv: ColumnLinear
    o: RowLinear
    heads: int
    kv_heads: int
    window: int | None
    q_norm: RmsNorm | None = None
    k_norm: RmsNorm | None = None


@dataclass(frozen=True)
class Mlp:
    """Weights of an MLP half-block, this rank's columns of it."""

    norm: RmsNorm
    gate_up: ColumnLinear
    down: RowLinear
    align: Align | None = None  # brings the input of down into its order; layout "naive" only


@dataclass(frozen=True)
class Forward:
    """What every layer of one forward shares."""

    config: ModelConfig
    phase: Phase
    cache: KvCache
    step: KvStep
    cos: Tensor
    sin: Tensor
    fused: FusedStep | None = None  # runs whole half-blocks
    _tiles: dict[tuple[int, int], KvStep] = field(default_factory=dict)

    def tile(self, lo: int, hi: int) -> KvStep:
        """The step of packed rows [lo, hi), the same for all layers."""
        if (lo, hi) not in self._tiles:
            self._tiles[lo, hi] = narrow(self.step, lo, hi)
        return self._tiles[lo, hi]


class AttentionHalf:
    """`Produce` of an attention half-block: norm'd input -> qkv -> rotary -> KV append -> attention -> o."""

    def __init__(self, weights: Attention, layer: int, hidden: Tensor, forward: Forward) -> None:
        self.weights, self.layer, self.hidden, self.forward = weights, layer, hidden, forward
        self.rows = hidden.shape[0]
        self.row_parallel: PackedWeight = weights.o.weight

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        """Attention output (hi - lo, heads * head_dim); rows before ``lo`` were asked for before."""
        w, f = self.weights, self.forward
        step = f.tile(lo, hi)
        q, k, v = self._project(self.hidden[lo:hi], step)
        f.cache.append(self.layer, step, k, v)
        window = None if w.window is None else (w.window - 1, None)
        return attend(f.cache, self.layer, step, q, window=window).flatten(1)

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        """This rank's partial result of rows [lo, hi)."""
        if self.forward.fused and hi - lo == self.rows:
            return self.forward.fused.attention(self.layer, self.hidden, out)
        return _into(out, self.weights.o(self.gemm_input(lo, hi)))

    def _project(self, hidden: Tensor, step: KvStep) -> tuple[Tensor, Tensor, Tensor]:
        w, f = self.weights, self.forward
        qk_heads = w.heads + w.kv_heads
        qkv = w.qkv(hidden).unflatten(-1, (qk_heads + w.kv_heads, f.config.head_dim))
        qk, v = qkv[:, :qk_heads], qkv[:, qk_heads:]
        if w.q_norm and w.k_norm:
            q, k = qk.split((w.heads, w.kv_heads), dim=1)
            qk = torch.cat((w.q_norm(q)[0], w.k_norm(k)[0]), dim=1)
        qk = rotary(qk, f.cos, f.sin, step.positions, interleaved=f.config.rope.interleaved)
        return qk[:, : w.heads], qk[:, w.heads :], v


class MlpHalf:
    """`Produce` of an MLP half-block: norm'd input -> gate, up -> SwiGLU -> down."""

    def __init__(self, weights: Mlp, layer: int, hidden: Tensor, fused: FusedStep | None = None) -> None:
        self.weights, self.layer, self.hidden, self.fused = weights, layer, hidden, fused
        self.rows = hidden.shape[0]
        self.row_parallel: PackedWeight = weights.down.weight

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        """Gated activations (hi - lo, columns of this rank)."""
        gated = swiglu(self.weights.gate_up(self.hidden[lo:hi]))
        return gated if self.weights.align is None else self.weights.align(gated)

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        """This rank's partial result of rows [lo, hi)."""
        if self.fused and hi - lo == self.rows:
            return self.fused.mlp(self.layer, self.hidden, out)
        return _into(out, self.weights.down(self.gemm_input(lo, hi)))


class Decoder:
    """The whole model on this rank: embedding, blocks, final norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: VocabParallelEmbedding,
        blocks: Sequence[tuple[Attention, Mlp]],
        norm: RmsNorm,
        head: VocabParallelHead,
        group: TPGroup,
        policy: Callable[[Point], SyncPolicy],
        schedule: Mapping[Phase, Schedule],
    ) -> None:
        self.config, self.embedding, self.blocks = config, embedding, tuple(blocks)
        self.norm, self.head, self.group, self.policy = norm, head, group, policy
        self.rope = RopeTables(config.rope, norm.weight.device)
        self.schedule = schedule
        #: Whether half-blocks may run as single native calls; the result is the same.
        self.fused = True
        self._known: dict[Phase, tuple[Callable[[Point], SyncPolicy], bool]] = {}

    def forward(
        self, ids: Tensor, step: KvStep, cache: KvCache, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Normalised hidden states (total, hidden) of packed token ids (total,); appends to the cache.

        ``lengths``: as of `RopeTables.of`.
        """
        phase: Phase = "prefill" if step.max_new > 1 else "decode"
        shared = self._begin(phase, step, cache, lengths)
        spans = self.schedule[phase].spans(ids.shape[0]) if self.group.world > 1 else ()
        if shared.fused and len(spans) <= 1 and self._sums_plainly(phase):
            return shared.fused.forward(ids)
        x = self.embedding(ids)
        if len(spans) <= 1:
            return woven([self._layers(x, shared)])[0]
        tiles = [self._shared(phase, shared.tile(lo, hi), cache, shared.cos, shared.sin) for lo, hi in spans]
        return torch.cat(woven([self._layers(x[lo:hi], t) for (lo, hi), t in zip(spans, tiles, strict=True)]))

    def next_tokens(
        self, ids: Tensor, step: KvStep, cache: KvCache, lengths: Sequence[int] | None = None
    ) -> Tensor | None:
        """The likeliest token after each of ``ids``, one new one a sequence, as one native call: (rows,)
        int64 to (rows,) int64, on every rank; -1 where the largest logit is NaN or infinite.

        None, and nothing is done, where that takes `forward`, the head and a sampler.
        """
        if step.max_new > 1 or not self._sums_plainly("decode"):
            return None
        if self.group.world > 1 and len(self.schedule["decode"].spans(ids.shape[0])) > 1:
            return None
        fused = self._begin("decode", step, cache, lengths).fused
        return fused.next_tokens(ids) if fused and fused.has_head else None

    def _begin(self, phase: Phase, step: KvStep, cache: KvCache, lengths: Sequence[int] | None) -> Forward:
        cos, sin, rows = self.rope.of(step, lengths)
        # Nothing but the tables is looked up by positions.
        return self._shared(phase, step._replace(positions=rows), cache, cos, sin)

    def _shared(self, phase: Phase, step: KvStep, cache: KvCache, cos: Tensor, sin: Tensor) -> Forward:
        fused = None
        if self.fused and self._fused:
            fused = self._fused.step(step.slots.shape[0], cache, step, cos, sin)
        return Forward(self.config, phase, cache, step, cos, sin, fused)

    def _layers(self, x: Tensor, shared: Forward) -> Generator[Work, Stream, Tensor]:
        """Yields each sync point's exchange, and goes on with its result."""
        stream, phase = Stream(residual=x, hidden=self.blocks[0][0].norm(x)[0]), shared.phase
        for layer, (attention, mlp) in enumerate(self.blocks):
            make = AttentionHalf(attention, layer, _ready(stream), shared)
            stream = yield self._start(Point(layer, "attn", phase), make, stream, attention.o.bias, mlp.norm)
            last = layer + 1 == len(self.blocks)
            following = self.norm if last else self.blocks[layer + 1][0].norm
            half = MlpHalf(mlp, layer, _ready(stream), shared.fused)
            stream = yield self._start(Point(layer, "mlp", phase), half, stream, mlp.down.bias, following)
        return _ready(stream)

    @cached_property
    def _fused(self) -> FusedDecoder | None:  # of the weights at the first forward
        if dispatch.unavailable("cpu"):
            return None
        from .fused import FusedDecoder, reasons_against  # load the native kernels

        return None if reasons_against(self) else FusedDecoder(self)

    def _sums_plainly(self, phase: Phase) -> bool:
        """Whether native code may pass every sync point: partial results, of this process or of ranks that
        share memory, are only added.
        """
        if self.group.world > 1 and not shares_memory(self.group):
            return False
        policy, plainly = self._known.get(phase, (None, False))
        if policy is not self.policy:  # which is a function of the point
            plainly = all(self._is_plain(layer, phase) for layer in range(len(self.blocks)))
            self._known[phase] = self.policy, plainly
        return plainly

    def _is_plain(self, layer: int, phase: Phase) -> bool:
        attention, mlp = self.blocks[layer]
        points = [Point(layer, "attn", phase), Point(layer, "mlp", phase)]
        biased = attention.o.bias is not None or mlp.down.bias is not None
        return not biased and all(isinstance(self.policy(p), Exact) for p in points)

    def _start(
        self,
        point: Point,
        make: AttentionHalf | MlpHalf,
        stream: Stream,
        bias: Tensor | None,
        norm: RmsNorm,
    ) -> Work:
        return self.policy(point).start(point, make, stream, Epilogue(bias, norm), self.group)


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def _ready(stream: Stream) -> Tensor:
    assert stream.hidden is not None, "a policy finished a sync point without the next half-block's input"
    return stream.hidden
