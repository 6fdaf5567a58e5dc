"""Embedding and head of which each rank holds a range of the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives.exchange import Lane, all_reduce, gather_last, shares_memory
from ..indices import readable
from ..ops import embedding, linear
from ..spec import PackedWeight, TPGroup


class VocabParallelEmbedding:
    """Looks up the tokens of this rank's range; exchanges between ranks complete the rows."""

    def __init__(
        self,
        weight: PackedWeight,
        spans: Sequence[tuple[int, int]],
        group: TPGroup,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``weight``: this rank's rows (hi - lo, hidden) of spans[rank]; ``spans``: every rank's range;
        ``dtype``: of the activations."""
        self.weight, self.group, self.dtype = weight, group, dtype
        self.lo, self.hi, self.vocab_size = _range(weight, spans, group)
        self._ends = torch.tensor([hi for _, hi in spans])

    def __call__(self, ids: Tensor) -> Tensor:
        """Integer ids (N,), the same on all ranks, to (N, hidden) on all ranks.

        Raises ValueError for an id outside the vocabulary; on a device, such an id gives zeros unless
        FASTATTN_STRICT is set.
        """
        if ids.numel() and readable(ids):
            listed = ids.tolist()
            low, high = min(listed), max(listed)
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise ValueError(f"ids: {bad} is outside the vocabulary of {self.vocab_size} tokens")
        if self.group.world == 1:
            return embedding(ids, self.weight, self.dtype)
        if ids.device.type != "cpu" or shares_memory(self.group):
            return self.summed(ids)
        return self.sent_by_owners(ids)

    def sent_by_owners(self, ids: Tensor) -> Tensor:
        """Each row travels once to each other rank, in one hop."""
        g = self.group
        owners = torch.bucketize(ids, self._ends, right=True)
        places = [(owners == r).nonzero().flatten() for r in range(g.world)]
        mine = embedding(ids[places[g.rank]] - self.lo, self.weight, self.dtype)
        out = mine.new_empty((ids.numel(), mine.shape[1]))
        found = {r: out.new_empty((places[r].numel(), out.shape[1])) for r in range(g.world) if r != g.rank}
        Lane(g, "embedding").swap(dict.fromkeys(found, mine), found).wait()
        for r, rows in {**found, g.rank: mine}.items():
            out[places[r]] = rows
        return out

    def summed(self, ids: Tensor) -> Tensor:
        """Exact too, since the others add zero. One collective, and no size depends on the ids, as a captured
        graph needs."""
        local = ids - self.lo
        foreign = (local < 0) | (local >= self.hi - self.lo)
        out = embedding(local.masked_fill(foreign, 0), self.weight, self.dtype)
        out = out.masked_fill(foreign[:, None], 0)
        all_reduce(self.group, out, "embedding").wait()
        return out


class VocabParallelHead:
    """This rank's logits, gathered."""

    def __init__(
        self, weight: PackedWeight, spans: Sequence[tuple[int, int]], group: TPGroup, act: str = ""
    ) -> None:
        """``weight``: this rank's rows (hi - lo, hidden) of spans[rank]; ``spans``: every rank's range;
        ``act``: see `ops.linear`."""
        self.weight, self.group, self.act = weight, group, act
        _range(weight, spans, group)
        self.widths = tuple(hi - lo for lo, hi in spans)

    def __call__(
        self, hidden: Tensor, last: Tensor | None = None, *, everywhere: bool = False
    ) -> Tensor | None:
        """Logits (N, vocab), in hidden's dtype, of ``hidden`` (N, hidden), or of its rows ``last`` only.

        On rank 0, None on the others; with ``everywhere`` on all ranks. ``last`` is an integer tensor, for
        packed prompts ``cu_seqlens[1:] - 1``.
        """
        x = hidden if last is None else hidden[last]
        mine = linear(x, self.weight, act=self.act)
        return gather_last(self.group, mine, self.widths, "logits", everywhere=everywhere)


def _range(weight: PackedWeight, spans: Sequence[tuple[int, int]], group: TPGroup) -> tuple[int, int, int]:
    """(lo, hi, vocabulary size) of this rank, checked."""
    ends = [0, *(hi for _, hi in spans)]
    if len(spans) != group.world or any(lo != end for (lo, _), end in zip(spans, ends, strict=False)):
        raise ValueError(f"spans: {tuple(spans)}, expected {group.world} that follow each other from 0")
    lo, hi = spans[group.rank]
    if weight.shape[0] != hi - lo:
        raise ValueError(f"weight: {weight.shape[0]} rows, expected {hi - lo} for span {spans[group.rank]}")
    return lo, hi, ends[-1]
