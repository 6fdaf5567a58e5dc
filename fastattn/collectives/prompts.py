"""Token ids from rank 0 to all ranks: integers in tensors, lengths first, nothing pickled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import TPGroup
from .exchange import broadcast, device_of

_WHERE = "prompts from rank 0"


def broadcast_prompts(g: TPGroup, prompts: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Rank 0's batch of token ids on every rank; the other ranks pass None.

    Three broadcasts of int64: the number of prompts, their lengths, all ids in a row. Raises ValueError
    when rank 0 has none, another rank has some, or rank 0 called `refuse_prompts`.
    """
    if (prompts is None) != (g.rank != 0):
        was = "none" if prompts is None else "given"
        raise ValueError(f"prompts: {was} on rank {g.rank}, expected on rank 0 and only there")
    device, where = device_of(g), _WHERE
    rows = [list(p) for p in prompts or ()]
    count = torch.tensor([len(rows)], dtype=torch.int64, device=device)
    broadcast(g, count, where)
    if int(count) < 0:
        raise ValueError("prompts: rank 0 refused them, its own error says why")
    lengths = _filled([len(p) for p in rows], int(count), device)
    broadcast(g, lengths, where)
    ids = _filled([t for p in rows for t in p], int(lengths.sum()), device)
    if ids.numel():
        broadcast(g, ids, where)
    return [part.tolist() for part in ids.split(lengths.tolist())] if len(lengths) else []


def refuse_prompts(g: TPGroup) -> None:
    """Rank 0 tells the ranks that wait in `broadcast_prompts` that there are none: they raise ValueError.

    The group stays usable, so one bad prompt does not cost a timeout or the process.
    """
    broadcast(g, torch.tensor([-1], dtype=torch.int64, device=device_of(g)), _WHERE)


def broadcast_tokens(g: TPGroup, tokens: Tensor | None, count: int) -> Tensor:
    """Rank 0's ``count`` sampled token ids, int64 (count,), on every rank; the other ranks pass None."""
    device = device_of(g)
    if g.rank == 0:
        if tokens is None or tokens.shape != (count,) or tokens.dtype != torch.int64:
            was = None if tokens is None else f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens: {was}, expected int64 ({count},) on rank 0")
        out = tokens.to(device).contiguous()
    else:
        out = torch.empty(count, dtype=torch.int64, device=device)
    broadcast(g, out, "tokens from rank 0")
    return out


def _filled(values: list[int], count: int, device: torch.device) -> Tensor:
    if len(values) == count:
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.empty(count, dtype=torch.int64, device=device)
