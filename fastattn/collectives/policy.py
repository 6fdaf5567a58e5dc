"""What the sync policies have in common: from a half-block to the stream behind its sync point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..spec import Epilogue, Link, Point, Produce, Rates, Stream, TPGroup
from .exchange import LAST_STEP, Lane
from .steps import Exchange, Steps
from .sums import Gather, Partial, row_spans
from .wire import Plain

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Sum(ABC):
    """A way to add up the ranks' partial results, and the policy that does it to all rows at once."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    scatters: ClassVar[bool] = False
    needs_full_residual: ClassVar[bool] = True

    @abstractmethod
    def steps(self, lane: Lane, x: Partial) -> Steps[Tensor]:
        """Sum of the ranks' ``x``, the same bits on every rank; may overwrite what ``x`` computes.

        Posts its receives, then computes ``x``, then yields. Uses any of the lane's steps but the last.
        """

    @abstractmethod
    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        """What the sync point adds to the time of its half-block."""

    @abstractmethod
    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        """Bytes that the rank which sends most sends."""

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        """[] if the policy can run at point ``p``."""
        return unsupported(dtype, FLOATS, g)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Exchange[Stream]:
        """Computes this rank's partial result of all rows and starts its sum."""
        return Exchange(self.rows(str(p), partial(make, s, 0, make.rows), s, e, g))

    def rows(self, where: str, x: Partial, s: Stream, e: Epilogue, g: TPGroup) -> Steps[Stream]:
        """The stream behind the sync point from this rank's partial ``x`` and the residual of its rows."""
        if g.world == 1:
            return finish(x.compute(), s.residual, e)
        lane = Lane(g, where)
        total = yield from self.steps(lane, x)
        residual = yield from full_residual(lane, s, x.rows)
        return finish(total, residual, e)


def partial(make: Produce, s: Stream, lo: int, hi: int) -> Partial:
    """This rank's part of rows [lo, hi), with what a dropped point before left unsummed."""

    def compute() -> Tensor:
        x = make.partial(lo, hi)
        return x if s.pending is None else x + s.pending[lo:hi]

    shape = (hi - lo, s.residual.shape[1], s.residual.dtype)
    if s.pending is not None:
        return Partial(*shape, compute)
    return Partial(*shape, compute, make.row_parallel, lambda: make.gemm_input(lo, hi))


def finish(total: Tensor, residual: Tensor, e: Epilogue) -> Stream:
    """The stream behind a sync point whose sum is ``total``; rows of ``residual`` are those of ``total``."""
    if e.bias is not None:
        total = total + e.bias
    if e.norm is None:
        return Stream(residual + total, None)
    hidden, residual = e.norm(total, residual)
    return Stream(residual, hidden)


def full_residual(lane: Lane, s: Stream, rows: int) -> Steps[Tensor]:
    """The residual of all rows, of which a fused norm before may have left each rank its share."""
    if s.rows is None:
        return s.residual
    whole, spans = s.residual.new_empty(rows, s.residual.shape[1]), row_spans(rows, lane.group.world)
    return (yield from Gather(lane, whole, dict(enumerate(spans)), Plain(), LAST_STEP).rows(s.residual))


def own_residual(s: Stream, rows: int, g: TPGroup) -> Tensor:
    """This rank's share (`row_spans`) of the residual."""
    lo, hi = row_spans(rows, g.world)[g.rank]
    return s.residual[lo:hi] if s.rows is None else s.residual


def unsupported(dtype: torch.dtype, accepted: Sequence[torch.dtype], g: TPGroup) -> list[str]:
    """The reason against ``dtype``, if there is one; with one rank nothing travels."""
    if dtype in accepted or g.world == 1:
        return []
    names = ", ".join(str(d).removeprefix("torch.") for d in accepted)
    return [f"dtype {str(dtype).removeprefix('torch.')} cannot be summed on the wire, only {names}"]
