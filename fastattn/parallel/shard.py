"""How a model is cut among ranks: whose heads, MLP columns and vocabulary rows.

`plan` decides once for all ranks; the functions below it turn a rank's `ModelShard` into the
`spec.Shard` of each matrix. All cuts are exact for any number of ranks up to the number of query heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from ..quant.cuts import take
from ..shares import usable
from ..spec import Cut, Shard, Span


class Dims(Protocol):
    """The sizes of a model that decide its cuts (`models.config.ModelConfig` has them)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class ModelShard(NamedTuple):
    """What one rank holds; query head ``h`` reads KV head ``h // (len(q_heads) // len(kv_heads))``."""

    rank: int
    world: int
    q_heads: tuple[int, ...]  # contiguous
    kv_heads: tuple[int, ...]  # one entry a local KV head; repeated where the local groups would be unequal
    ffn: Span  # columns of the MLP's hidden layer
    vocab: Span  # rows of the embedding and of the head


def plan(
    config: Dims, world: int, weights: Sequence[float] | None = None, *, align: int = 32
) -> tuple[ModelShard, ...]:
    """The shards of all ranks, largest remainder by ``weights`` (default: equal).

    Up to ``num_kv_heads`` ranks share whole KV groups; more ranks split the query heads and replicate the
    KV heads that several of them read. MLP cuts fall on multiples of ``align`` (the groups of quantized
    weights; 1 for dense ones). Raises ValueError when a rank would be left without work.
    """
    heads, kv = config.num_heads, config.num_kv_heads
    if kv < 1 or heads % kv:
        raise ValueError(f"num_heads: {heads}, expected a multiple of num_kv_heads {kv}")
    if align < 1:
        raise ValueError(f"align: {align}, expected a positive number")
    shares = tuple(weights) if weights is not None else (1.0,) * world
    if len(shares) != world or (shares and not usable(shares)):
        raise ValueError(f"weights: {shares}, expected {world} positive numbers, one a rank")
    blocks = -(-config.intermediate_size // align)
    for what, most in (
        ("query heads", heads),
        (f"blocks of {align} MLP columns", blocks),
        ("vocabulary rows", config.vocab_size),
    ):
        if not 1 <= world <= most:
            raise ValueError(f"world: {world} ranks, this model has {most} {what}: expected 1 to {most}")
    group = heads // kv
    q_cuts = _shares(kv, shares, group) if world <= kv else _shares(heads, shares)
    ffn_cuts = [(lo, min(hi, config.intermediate_size)) for lo, hi in _shares(blocks, shares, align)]
    vocab_cuts = _shares(config.vocab_size, shares)
    return tuple(
        ModelShard(rank, world, tuple(range(lo, hi)), _kv_heads(lo, hi, group), ffn, vocab)
        for rank, ((lo, hi), ffn, vocab) in enumerate(zip(q_cuts, ffn_cuts, vocab_cuts, strict=True))
    )


def _shares(units: int, weights: Sequence[float], size: int = 1) -> list[Span]:
    """Cuts ``units`` by largest remainder, at least one each; spans in multiples of ``size``."""
    total = math.fsum(weights)
    ideal = [units * w / total for w in weights]
    counts = [max(1, math.floor(x)) for x in ideal]
    ranks = range(len(weights))
    while sum(counts) < units:
        counts[max(ranks, key=lambda r: (ideal[r] - counts[r], -r))] += 1
    while sum(counts) > units:
        counts[max((r for r in ranks if counts[r] > 1), key=lambda r: (counts[r] - ideal[r], r))] -= 1
    return [(lo * size, hi * size) for lo, hi in pairwise(accumulate(counts, initial=0))]


def _kv_heads(lo: int, hi: int, group: int) -> tuple[int, ...]:
    """KV heads of query heads [lo, hi), repeated so that each entry serves equally many of them."""
    runs = [(head, len(list(run))) for head, run in groupby(range(lo, hi), key=lambda h: h // group)]
    each = math.gcd(*(n for _, n in runs))
    return tuple(head for head, n in runs for _ in range(n // each))


# ------------------------------------------------------------------------------------- cuts of matrices
def q_rows(m: ModelShard, c: Dims) -> Shard:
    """Of q_proj (num_heads * head_dim, hidden): the rows of this rank's query heads."""
    return _rows(m, Cut(c.num_heads * c.head_dim, _head_spans(m.q_heads, c.head_dim)), c.hidden_size)


def kv_rows(m: ModelShard, c: Dims) -> Shard:
    """Of k_proj and v_proj (num_kv_heads * head_dim, hidden): the rows of this rank's KV heads."""
    return _rows(m, Cut(c.num_kv_heads * c.head_dim, _head_spans(m.kv_heads, c.head_dim)), c.hidden_size)


def o_columns(m: ModelShard, c: Dims) -> Shard:
    """Of o_proj (hidden, num_heads * head_dim): the columns of this rank's query heads."""
    return _columns(m, Cut(c.num_heads * c.head_dim, _head_spans(m.q_heads, c.head_dim)), c.hidden_size)


def ffn_rows(m: ModelShard, c: Dims) -> Shard:
    """Of gate_proj and up_proj (intermediate, hidden)."""
    return _rows(m, Cut(c.intermediate_size, (m.ffn,)), c.hidden_size)


def ffn_columns(m: ModelShard, c: Dims) -> Shard:
    """Of down_proj (hidden, intermediate)."""
    return _columns(m, Cut(c.intermediate_size, (m.ffn,)), c.hidden_size)


def vocab_rows(m: ModelShard, c: Dims) -> Shard:
    """Of the embedding and the head (vocab, hidden)."""
    return _rows(m, Cut(c.vocab_size, (m.vocab,)), c.hidden_size)


def cut_vector(x: Tensor, cut: Cut) -> Tensor:
    """The elements of a 1-D ``x`` (cut.size,) that ``cut`` selects: the bias of a column-parallel layer.

    A row-parallel layer's bias is not cut: every rank adds all of it, once, after the sum.
    """
    if x.shape != (cut.size,):
        raise ValueError(f"x: {tuple(x.shape)}, expected ({cut.size},)")
    return take(x, cut)


def _rows(m: ModelShard, out: Cut, inn: int) -> Shard:
    return Shard(m.rank, m.world, out, Cut(inn), m.q_heads, m.kv_heads)


def _columns(m: ModelShard, inn: Cut, out: int) -> Shard:
    return Shard(m.rank, m.world, Cut(out), inn, m.q_heads, m.kv_heads)


def _head_spans(heads: Iterable[int], head_dim: int) -> tuple[Span, ...]:
    """Element spans of ``heads`` in order, neighbours joined."""
    spans: list[Span] = []
    for head in heads:
        lo, hi = head * head_dim, (head + 1) * head_dim
        if spans and spans[-1][1] == lo:
            lo = spans.pop()[0]
        spans.append((lo, hi))
    return tuple(spans)
