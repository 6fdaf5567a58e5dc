"""The choice among torch_npu's attention operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import atb, fused_infer, fusion
from .call import AttentionCall, Lengths, lengths, on_device
from .chips import Chip
from .invocation import Invocation


class Route(NamedTuple):
    """Where a call goes: what speaks against each family of operators, and the call of the first that can."""

    call: AttentionCall
    chip: Chip
    capturing: bool
    against: dict[str, list[str]]  # in order of preference; [] for a family that can run the call
    lengths: Lengths | None  # None: they have no say, and were not read

    def unsupported(self) -> list[str]:
        """Why no operator of torch_npu can run the call, one line for each family; [] if one can."""
        if not all(self.against.values()):
            return []
        return [f"{name}: {'; '.join(why)}" for name, why in self.against.items()]

    def invocation(self) -> Invocation | None:
        """The exact call; None when there are no scores, so that `empty` is the result.

        Raises ValueError with every reason when no operator can run it.
        """
        lines = self.unsupported()
        if lines:
            text = "\n  ".join(lines)
            raise ValueError(f"no operator of torch_npu on {self.chip.family} can run this call:\n  {text}")
        assert self.lengths is not None
        if _empty(self.lengths):
            return None
        family = next(name for name, why in self.against.items() if not why)
        if family == "fused_infer":
            return fused_infer.invocation(self.call, self.lengths, self.chip)
        if family == "fusion":
            return fusion.invocation(self.call, self.lengths, capturing=self.capturing)
        return atb.invocation(self.call, self.lengths, self.chip)


def route(call: AttentionCall, chip: Chip, *, capturing: bool = False) -> Route:
    """Decides once; lengths on a device are read once, and not at all if nothing depends on them.

    ``capturing``: into a graph, during which lengths on a device cannot be read.
    """
    against = {
        "fused_infer": fused_infer.static_reasons(call, chip, capturing=capturing),
        "fusion": fusion.static_reasons(call, chip, capturing=capturing),
        "atb": atb.static_reasons(call, chip),
    }
    if all(against.values()):
        return Route(call, chip, capturing, against, None)
    if capturing and on_device(call):
        against = {
            n: [*why, "lengths: on the device, while a graph is captured"] for n, why in against.items()
        }
        return Route(call, chip, capturing, against, None)
    lens = lengths(call)
    if not _empty(lens):
        later: dict[str, Callable[[], list[str]]] = {
            "fused_infer": lambda: fused_infer.reasons(call, lens, chip),
            "fusion": lambda: fusion.reasons(call, lens),
            "atb": lambda: atb.reasons(call, lens, chip),
        }
        against = {name: why or later[name]() for name, why in against.items()}
    return Route(call, chip, capturing, against, lens)


def empty(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The result of a call without scores."""
    out = call.q.new_zeros((*call.q.shape[:-1], call.v_head_dim))
    if not call.return_lse:
        return out, None
    shape = (*call.q.shape[:-3], call.heads, call.q.shape[-3])
    lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=call.q.device)
    return out, lse if call.sinks is None else call.sinks[:, None].expand(shape).contiguous()


def _empty(lens: Lengths) -> bool:
    return not lens.q or not max(lens.q) or not max(lens.k)
