"""Tensor parallelism in one process: what each of several ranks would add at a sync point, and the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.collectives.exact import Exact
from fastattn.models.config import ModelConfig
from fastattn.ops import linear
from fastattn.parallel import shard
from fastattn.parallel.calibrate import ChannelShares
from fastattn.quant.codec import Codec
from fastattn.quant.packed import slice_in
from fastattn.spec import Epilogue, PackedWeight, Point, Produce, Stream, TPGroup, Work

Pieces = list[tuple[int, int, PackedWeight]]


class SimulatedRanks:
    """A `spec.SyncPolicy` of a model on one rank: sums as ``world`` ranks with `parallel.shard`'s cuts would.

    ``codec(point)`` says how the partial results of a point travel; None: exactly, summed in float32.
    ``shares``, if set, counts them.
    """

    def __init__(self, config: ModelConfig, world: int) -> None:
        self._config, self._shards = config, shard.plan(config, world)
        self._pieces: dict[tuple[int, str], Pieces] = {}
        self._alone = Exact()
        self.codec: Callable[[Point], Codec | None] = lambda p: None
        self.shares: ChannelShares | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._alone, name)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Work:
        return self._alone.start(p, _Summed(self, p, make), s, e, g)

    def total(self, p: Point, x: Tensor, weight: PackedWeight) -> Tensor:
        """The ranks' sum of ``x @ weight^T`` (rows, hidden), each with its columns of x and of the weight."""
        parts = [linear(x[:, lo:hi].contiguous(), piece) for lo, hi, piece in self._cut(p, weight)]
        if self.shares:
            for part in parts:
                self.shares.add(p, part)
        codec, (rows, hidden), dtype = self.codec(p), parts[0].shape, parts[0].dtype
        if codec is None:
            return torch.stack(parts).float().sum(0).to(dtype)
        return codec.decode_sum([codec.encode(part) for part in parts], rows, hidden, dtype)

    def _cut(self, p: Point, weight: PackedWeight) -> Pieces:
        """Each rank's columns of a row-parallel weight, cut once."""
        key = (p.layer, p.site)
        if key not in self._pieces:
            columns = shard.o_columns if p.site == "attn" else shard.ffn_columns
            spans = [columns(m, self._config).inn.spans for m in self._shards]
            self._pieces[key] = [(lo, hi, slice_in(weight, lo, hi)) for ((lo, hi),) in spans]
        return self._pieces[key]


class _Summed:
    """A half-block whose partial result is the sum of the simulated ranks'."""

    def __init__(self, ranks: SimulatedRanks, point: Point, make: Produce) -> None:
        self._ranks, self._point, self._make = ranks, point, make
        self.rows, self.row_parallel = make.rows, make.row_parallel

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        total = self._ranks.total(self._point, self.gemm_input(lo, hi), self.row_parallel)
        return total if out is None else out.copy_(total)

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        return self._make.gemm_input(lo, hi)
