"""In what order the rows of a forward pass through the sync points.

A model offers its layers as a generator that yields each sync point's `Work` and is sent its result.
`woven` (TokenWeave, arXiv 2505.11329) runs several of them, tiles of the batch's rows, in turn: while one
tile's partial results are summed and normalised, the others compute. A tile's rows come before the next one's
in the KV cache, layer by layer, so each attends over the keys of those before it as in chunked prefill.

This carries tiling-AllReduce (arXiv 2410.16663; the policy `tiled` within one half-block) through the whole
stack: a half-block begins with the first tile as soon as that tile's sum is there.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ..collectives.tiled import check_tiles, tile_spans
from ..spec import Span, Stream, SyncError, Work

T = TypeVar("T")
Layers = Generator[Work, Stream, T]


@dataclass(frozen=True)
class Plain:
    """One batch of rows."""

    name: ClassVar[str] = "plain"

    def spans(self, rows: int) -> list[Span]:
        return [(0, rows)]


@dataclass(frozen=True)
class TokenWeave:
    """Tiles of rows, from ``min_tokens`` rows on; two equal ones are the paper's.

    ``tiles``: their shares of the rows, in order (`collectives.tiled.Tiled` has them for one sync point).
    More tiles leave less to wait for at both ends of the stack, and the link more to send at once; each takes
    a half-block's fixed cost. ``multiple``: where a tile ends, for kernels that work in tiles of their own
    (on GPUs a wave of them; 1: anywhere).
    """

    min_tokens: int = 256
    tiles: tuple[float, ...] = (1.0, 1.0)
    multiple: int = 16

    name: ClassVar[str] = "token_weave"

    def __post_init__(self) -> None:
        for what, value in (("min_tokens", self.min_tokens), ("multiple", self.multiple)):
            if value < 1:
                raise ValueError(f"{what}: {value}, expected at least 1")
        check_tiles(self.tiles)

    def spans(self, rows: int) -> list[Span]:
        """Where rows are too few for ``multiple``, tiles end anywhere; those without a row are left out."""
        if rows < self.min_tokens:
            return [(0, rows)]
        aligned = tile_spans(rows, self.tiles, self.multiple)
        return aligned if len(aligned) == len(self.tiles) else tile_spans(rows, self.tiles)


def woven(parts: Sequence[Layers[T]]) -> list[T]:
    """Runs the parts in turn, sync point by sync point; on an error, what is still under way is awaited.

    With one part nothing overlaps: its sums go on in the thread that waits for them.
    """
    works: list[Work] = []
    results: list[T] = []
    several = len(parts) > 1
    try:
        works.extend(_under_way(next(part), several) for part in parts)
        while len(results) < len(parts):
            for i, part in enumerate(parts):
                stream = works[i].wait()
                try:
                    works[i] = _under_way(part.send(stream), several)
                except StopIteration as end:
                    results.append(end.value)
    except BaseException:  # whatever it is, what is under way must be awaited
        for work in works:
            with suppress(SyncError):
                work.cancel()
        raise
    return results


def _under_way(work: Work, several: bool) -> Work:
    return work.overlap() if several else work
