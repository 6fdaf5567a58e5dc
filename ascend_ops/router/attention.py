"""The choice among torch_npu's attention operators."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import atlas_310p, fused_infer, fusion
from .call import AttentionCall, Lengths, lengths, on_device
from .chips import Chip
from .invocation import Invocation

Reasons = dict[str, list[str]]


def reasons_against(call: AttentionCall, chip: Chip, *, capturing: bool = False) -> Reasons:
    """The reasons of each operator family, in order of preference; [] for those that can run the call.

    ``capturing``: into a graph, during which lengths on a device cannot be read.
    """
    found = _static(call, chip, capturing=capturing)
    if all(found.values()):
        return found
    if capturing and on_device(call):
        return {
            name: [*why, "lengths: on the device, while a graph is captured"] for name, why in found.items()
        }
    lens = lengths(call)
    if _empty(lens):
        return found
    later: dict[str, Callable[[], list[str]]] = {
        "fused_infer": lambda: fused_infer.reasons(call, lens, chip),
        "fusion": lambda: fusion.reasons(call, lens),
        "310p": lambda: atlas_310p.reasons(call, lens),
    }
    return {name: why or later[name]() for name, why in found.items()}


def _static(call: AttentionCall, chip: Chip, *, capturing: bool) -> Reasons:
    return {
        "fused_infer": fused_infer.static_reasons(call, chip, capturing=capturing),
        "fusion": fusion.static_reasons(call, chip, capturing=capturing),
        "310p": atlas_310p.static_reasons(call, chip),
    }


def unsupported(call: AttentionCall, chip: Chip, *, capturing: bool = False) -> list[str]:
    """Why no operator of torch_npu can run the call, one line for each family of them; [] if one can."""
    found = reasons_against(call, chip, capturing=capturing)
    if not all(found.values()):
        return []
    return [f"{name}: {'; '.join(why)}" for name, why in found.items()]


def choose(call: AttentionCall, chip: Chip, *, capturing: bool = False) -> Invocation | None:
    """The first operator that can run the call; None when there are no scores, so that `empty` is the result.

    Raises ValueError with every reason when none can.
    """
    found = reasons_against(call, chip, capturing=capturing)
    able = [name for name, why in found.items() if not why]
    if not able:
        lines = "\n".join(f"  {name}: {'; '.join(why)}" for name, why in found.items())
        raise ValueError(f"no operator of torch_npu on {chip.family} can run this call:\n{lines}")
    lens = lengths(call)
    if _empty(lens):
        return None
    if able[0] == "fused_infer":
        return fused_infer.invocation(call, lens, chip)
    if able[0] == "fusion":
        return fusion.invocation(call, lens, capturing=capturing)
    return atlas_310p.invocation(call, lens)


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
