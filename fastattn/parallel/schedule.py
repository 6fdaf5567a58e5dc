"""In what order the rows of a forward pass through the sync points.

A model offers its layers as a generator that yields each sync point's `Work` and is sent its result.
`one_after_another` waits for each at once. `woven` (TokenWeave, arXiv 2505.11329) runs two of them, the
halves of a batch of tokens, in turn: while one half's partial results are summed and normalised, the other
half computes. The first half's rows come before the second's in the KV cache, layer by layer, so the second
attends over the first's keys as in chunked prefill.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ..spec import Stream, SyncError, Work

T = TypeVar("T")
Layers = Generator[Work, Stream, T]


@dataclass(frozen=True)
class Plain:
    """One batch of rows."""

    name: ClassVar[str] = "plain"

    def split(self, rows: int) -> int:
        return 0


@dataclass(frozen=True)
class TokenWeave:
    """Two halves of nearly equal size, from ``min_tokens`` rows on.

    ``first``: the first half's share of the rows. ``multiple``: its rows are a multiple of this, for
    kernels that work in tiles (on GPUs a wave of them; 1: any number).
    """

    min_tokens: int = 256
    first: float = 0.5
    multiple: int = 16

    name: ClassVar[str] = "token_weave"

    def __post_init__(self) -> None:
        for what, value in (("min_tokens", self.min_tokens), ("multiple", self.multiple)):
            if value < 1:
                raise ValueError(f"{what}: {value}, expected at least 1")
        if not 0 < self.first < 1:
            raise ValueError(f"first: {self.first}, expected a share between 0 and 1")

    def split(self, rows: int) -> int:
        if rows < max(2, self.min_tokens):
            return 0
        wanted = round(rows * self.first / self.multiple) * self.multiple
        return wanted if 0 < wanted < rows else max(1, min(rows - 1, round(rows * self.first)))


def one_after_another(layers: Layers[T]) -> T:
    """Runs the layers, waiting at every sync point."""
    try:
        work = next(layers)
        while True:
            work = layers.send(work.wait())
    except StopIteration as end:
        result: T = end.value
        return result


def woven(first: Layers[T], second: Layers[T]) -> tuple[T, T]:
    """Runs two halves in turn; on an error, what is still under way is awaited."""
    halves, works = (first, second), [_next(first)]
    results: list[T] = []
    try:
        works.append(_next(second))
        while len(results) < 2:
            for i, half in enumerate(halves):
                stream = works[i].wait()
                try:
                    works[i] = half.send(stream).overlap()
                except StopIteration as end:
                    results.append(end.value)
    except BaseException:  # whatever it is, what is under way must be awaited
        for work in works:
            with suppress(SyncError):
                work.cancel()
        raise
    return results[0], results[1]


def _next(layers: Layers[T]) -> Work:
    return next(layers).overlap()
