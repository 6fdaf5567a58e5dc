"""The policy `dropped` (SPD, arXiv 2502.20727, figure 3): no exchange; the next sync point sums both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..spec import Epilogue, Link, Point, Produce, Rates, Stream, TPGroup
from .exchange import Lane
from .policy import finish, full_residual, partial
from .steps import Exchange, Steps


@dataclass(frozen=True)
class Dropped:
    """The residual stays exact: it gets the bias, once, and the partial result waits as ``pending``.

    Only the next norm sees this rank's view, ``residual + bias + partial``. With one rank that is the sum.
    """

    name: ClassVar[str] = "dropped"
    exact: ClassVar[bool] = False
    scatters: ClassVar[bool] = False
    needs_full_residual: ClassVar[bool] = True

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        """The paper drops the sync point after attention; after the MLP nothing would ever be summed."""
        return [] if p.site == "attn" else [f"{p}: only the sync point after attention can be dropped"]

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Exchange[Stream]:
        """Computes this rank's partial result; nothing travels, unless the residual is scattered."""
        return Exchange(self._steps(str(p), partial(make, s, 0, make.rows).compute(), s, e, g))

    def _steps(self, where: str, x: Tensor, s: Stream, e: Epilogue, g: TPGroup) -> Steps[Stream]:
        if g.world == 1:
            return finish(x, s.residual, e)
        residual = yield from full_residual(Lane(g, where), s, x.shape[0])
        if e.bias is not None:
            residual = residual + e.bias
        view = finish(x, residual, Epilogue(None, e.norm))
        return Stream(residual, view.hidden, pending=x)

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        return 0.0

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        return 0
