"""Which channels of the partial results are outliers, measured on a text.

At a sync point a few channels are far larger than all others, the same ones for nearly every token and
text. `quant.codec.Codec` keeps such channels in 16 bits, so that they do not raise the scales of their
blocks. Tokens differ much in magnitude, and blocks lie within a token's row, so what counts is a channel's
share of its row: the statistic is the mean over rows of ``x^2 / mean(x^2 of the row)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..collectives.exchange import all_reduce
from ..spec import Epilogue, PackedWeight, Point, Produce, Stream, SyncPolicy, TPGroup, Work

Site = tuple[int, str]  # layer, "attn" or "mlp"


class ChannelShares:
    """The mean share of each channel in its row, of the partial results at every sync point."""

    def __init__(self) -> None:
        self._sums: dict[Site, Tensor] = {}  # float64 (hidden + 1,): sums of shares, and the rows

    def add(self, p: Point, partial: Tensor) -> None:
        """Counts the rows of a partial result (rows, hidden), but for those that are zero or not finite."""
        squares = partial.double().square()
        mean = squares.mean(1, keepdim=True)
        counts = torch.isfinite(mean) & (mean > 0)
        shares = torch.where(counts, squares / mean, 0.0)
        sums = torch.cat((shares.sum(0), counts.sum()[None])).to("cpu", torch.float64)
        site = (p.layer, p.site)
        self._sums[site] = self._sums[site] + sums if site in self._sums else sums

    def share(self, layer: int, site: str) -> Tensor:
        """Float64 (hidden,), 1 on average; ValueError when nothing was counted there."""
        sums = self._sums.get((layer, site))
        if sums is None or not sums[-1]:
            seen = ", ".join(f"{a} {b}" for a, b in sorted(self._sums)) or "none"
            raise ValueError(f"layer {layer} {site}: no row was recorded there, only at layers: {seen}")
        return sums[:-1] / sums[-1]

    def outliers(self, count: int) -> dict[Site, tuple[int, ...]]:
        """The ``count`` channels of the largest share at each site, ascending; of equals the lower."""
        result = {}
        for site in sorted(self._sums):
            share = self.share(*site)
            if not 0 <= count <= share.numel():
                raise ValueError(f"count: {count}, expected 0 to {share.numel()}")
            order = share.sort(descending=True, stable=True).indices
            result[site] = tuple(sorted(order[:count].tolist()))
        return result

    def merge(self, group: TPGroup) -> None:
        """Adds up what the ranks counted, each its own partial results. Every rank calls it, once."""
        for site in sorted(self._sums):
            all_reduce(group, self._sums[site], f"channel shares of layer {site[0]} {site[1]}").wait()


class HasPolicy(Protocol):
    """A decoder, as far as recording needs it."""

    policy: Callable[[Point], SyncPolicy]


@contextmanager
def recording(decoder: HasPolicy) -> Iterator[ChannelShares]:
    """Within the block, every partial result of ``decoder`` on this rank is counted, and not changed."""
    shares, before = ChannelShares(), decoder.policy
    decoder.policy = lambda p: _Recorded(before(p), shares)
    try:
        yield shares
    finally:
        decoder.policy = before


class _Recorded:
    """A `SyncPolicy` that is another one, but for what it sees."""

    def __init__(self, policy: SyncPolicy, shares: ChannelShares) -> None:
        self._policy, self._shares = policy, shares

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Work:
        return self._policy.start(p, _Watched(make, p, self._shares), s, e, g)


class _Watched:
    """A `Produce` whose partial results are counted."""

    def __init__(self, make: Produce, point: Point, shares: ChannelShares) -> None:
        self._make, self._point, self._shares = make, point, shares
        self.rows: int = make.rows
        self.row_parallel: PackedWeight = make.row_parallel

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        result = self._make.partial(lo, hi, out)
        self._shares.add(self._point, result)
        return result

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        return self._make.gemm_input(lo, hi)
