"""The policy `fused_norm` (TokenWeave, arXiv 2505.11329): reduce-scatter, residual + RMSNorm, all-gather.

Each rank adds the residual and normalises its share of the rows only, which divides that work by the ranks;
the residual stays where it is, scattered, from one fused norm to the next.

On GPUs that address each other's memory all of it is one kernel between two barriers (`symmetric`), in the
stream that computes: a token weave would hide nothing of it, so `parallel.plan` refuses the two together.
Elsewhere, and for values that travel in fewer bits, the ranks exchange messages, and that is what `seconds`
and `wire_bytes` describe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor

from ..spec import Epilogue, Link, Point, Produce, Rates, Stream, TPGroup
from . import symmetric
from .cost import two_step_bytes, two_step_seconds
from .direct import Direct
from .exchange import Lane, device_of
from .pairwise import Pairwise
from .policy import FLOATS, finish, own_residual, partial, unsupported
from .steps import Exchange, Steps
from .sums import Partial, row_spans, two_step


@dataclass(frozen=True)
class FusedNorm:
    """``of`` says how values travel: `Direct` as they are, `Compressed` in fewer bits. Its ``scheme`` is not
    used: the sum always takes two steps.

    The normalised rows travel in the same form as the partial results, and every rank reads the same
    messages: all have the same bits.
    """

    of: Pairwise = field(default_factory=Direct)

    name: ClassVar[str] = "fused_norm"
    scatters: ClassVar[bool] = True
    needs_full_residual: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        return self.of.exact

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        if isinstance(self.of, Direct) and device_of(g).type == "cuda":
            return unsupported(dtype, FLOATS, g)  # symmetric memory may spare the messages
        return self.of.reasons(p, rows, hidden, dtype, g)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Exchange[Stream]:
        """Computes this rank's partial result of all rows and starts to sum it."""
        return Exchange(self._steps(str(p), partial(make, s, 0, make.rows), s, e, g))

    def _steps(self, where: str, x: Partial, s: Stream, e: Epilogue, g: TPGroup) -> Steps[Stream]:
        if g.world == 1:
            return finish(x.compute(), s.residual, e)
        residual = own_residual(s, x.rows, g)
        memory = self._memory(x, s, e, g)
        if memory is not None:
            norm = cast(symmetric.RmsNorm, e.norm)  # `symmetric.reasons_against` saw to it
            return symmetric.sum_and_normalise(memory, x.compute(), residual, norm, g)

        def normalise(total: Tensor) -> Tensor:
            nonlocal residual
            out = finish(total, residual, e)
            residual = out.residual
            return residual if out.hidden is None else out.hidden

        hidden = yield from two_step(Lane(g, where), x, self.of.wire, normalise)
        return Stream(residual, hidden if e.norm else None, rows=row_spans(x.rows, g.world)[g.rank])

    def _memory(self, x: Partial, s: Stream, e: Epilogue, g: TPGroup) -> symmetric.Memory | None:
        """Where the kernel finds the ranks' partial results; None: they travel."""
        call = symmetric.Call(x.rows, x.hidden, x.dtype, s.residual.device)
        if not isinstance(self.of, Direct) or symmetric.reasons_against(call, e):
            return None
        return symmetric.memory(call, g)

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        """Each rank leaves the other ranks' rows to them."""
        spared = rows - -(-rows // rate.world)
        return two_step_seconds(self.of.wire, rows, hidden, link, rate) - spared * rate.norm_row_s

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        return two_step_bytes(self.of.wire, rows, hidden, world)
