"""The policy `tiled`: tiling-AllReduce (FastAttention, arXiv 2410.16663).

The half-block is computed in tiles of rows, attention and projections alike, and the sum of each tile is
under way while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from ..shares import usable
from ..spec import Epilogue, Link, Point, Produce, Rates, Span, Stream, TPGroup
from .exact import Exact
from .policy import Sum, partial
from .steps import Exchange


@dataclass(frozen=True)
class Tiled:
    """``of`` sums each tile; ``tiles`` are their shares of the rows, in order (equal numbers: equal tiles).

    A short first tile brings the link to work early, for where it is the bottleneck; a short last tile
    leaves little to wait for where computation is. `parallel.planner` chooses.
    """

    of: Sum = field(default_factory=Exact)
    tiles: tuple[float, ...] = (1.0, 1.0)

    name: ClassVar[str] = "tiled"
    scatters: ClassVar[bool] = False
    needs_full_residual: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_tiles(self.tiles)

    @property
    def exact(self) -> bool:
        return self.of.exact

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        return self.of.reasons(p, rows, hidden, dtype, g)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> TiledWork:
        """Computes all tiles; returns while the last ones are being summed."""
        if g.world == 1 or s.rows is not None:
            return TiledWork([self.of.start(p, make, s, e, g)])
        works: list[Exchange[Stream]] = []
        try:
            for lo, hi in tile_spans(make.rows, self.tiles):
                x = partial(make, s, lo, hi)
                tile = s._replace(residual=s.residual[lo:hi], pending=None)
                works.append(Exchange(self.of.rows(f"{p} rows {lo} to {hi}", x, tile, e, g)).overlap())
        except BaseException:  # whatever it is, what is under way must be awaited
            TiledWork(works).cancel()
            raise
        return TiledWork(works)

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        """A tile's sum begins when it is computed and the sum before it has ended."""
        computed = summed = 0.0
        for lo, hi in tile_spans(rows, self.tiles):
            computed += rate.half_block(hi - lo)
            summed = max(summed, computed) + self.of.seconds(hi - lo, hidden, link, rate)
        return summed - rate.half_block(rows)

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        return sum(self.of.wire_bytes(hi - lo, hidden, world) for lo, hi in tile_spans(rows, self.tiles))


class TiledWork:
    """A `spec.Work` of the tiles' sums."""

    def __init__(self, works: Sequence[Exchange[Stream]]) -> None:
        self._works = works

    def overlap(self) -> TiledWork:
        for work in self._works:
            work.overlap()
        return self

    def wait(self) -> Stream:
        try:
            streams = [work.wait() for work in self._works]
        except BaseException:  # as above
            self.cancel()
            raise
        if len(streams) == 1:
            return streams[0]
        residuals, hidden = zip(*[(s.residual, s.hidden) for s in streams], strict=True)
        return Stream(torch.cat(residuals), None if hidden[0] is None else torch.cat(hidden))

    def cancel(self) -> None:
        for work in self._works:
            work.cancel()


def check_tiles(shares: Sequence[float]) -> None:
    """Raises ValueError for what `tile_spans` cannot use."""
    if not usable(shares):
        raise ValueError(f"tiles: {shares}, expected positive shares of the rows")


def tile_spans(rows: int, shares: Sequence[float], multiple: int = 1) -> list[Span]:
    """Tiles of ``rows`` in proportion to ``shares``, which end at a ``multiple`` but for the last; those that
    round to nothing are left out.
    """
    total = sum(shares)
    inner = [round(rows * part / total / multiple) * multiple for part in accumulate(shares[:-1])]
    return [(lo, hi) for lo, hi in pairwise([0, *(min(n, rows) for n in inner), rows]) if lo < hi]
