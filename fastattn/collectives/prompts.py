"""Token ids from rank 0 to all ranks: integers in tensors, lengths first, nothing pickled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from ..spec import TPGroup
from .exchange import broadcast, device_of

_PROMPTS, _TOKENS = "prompts from rank 0", "tokens from rank 0"
_REFUSED = -2  # in place of a count or a token; -1 is a sequence's end


def broadcast_prompts(g: TPGroup, prompts: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """Rank 0's batch of token ids on every rank; the other ranks pass None.

    Three broadcasts of int64: the number of prompts, their lengths, all ids in a row. Raises ValueError
    when rank 0 has none, another rank has some, or rank 0 failed in `preparing_prompts`.
    """
    if (prompts is None) != (g.rank != 0):
        was = "none" if prompts is None else "given"
        raise ValueError(f"prompts: {was} on rank {g.rank}, expected on rank 0 and only there")
    device, where = device_of(g), _PROMPTS
    rows = [list(p) for p in prompts or ()]
    count = torch.tensor([len(rows)], dtype=torch.int64, device=device)
    broadcast(g, count, where)
    if int(count) == _REFUSED:
        raise ValueError("prompts: rank 0 refused them, its own error says why")
    lengths = _filled([len(p) for p in rows], int(count), device)
    broadcast(g, lengths, where)
    ids = _filled([t for p in rows for t in p], int(lengths.sum()), device)
    if ids.numel():
        broadcast(g, ids, where)
    return [part.tolist() for part in ids.split(lengths.tolist())] if len(lengths) else []


def broadcast_tokens(g: TPGroup, tokens: Tensor | None, count: int) -> Tensor:
    """Rank 0's ``count`` sampled token ids, int64 (count,), on every rank; the other ranks pass None.

    Raises ValueError when rank 0's are not of that kind, or rank 0 failed in `choosing_tokens`.
    """
    device = device_of(g)
    if g.rank == 0:
        if tokens is None or tokens.shape != (count,) or tokens.dtype != torch.int64:
            was = None if tokens is None else f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens: {was}, expected int64 ({count},) on rank 0")
        out = tokens.to(device).contiguous()
    else:
        out = torch.empty(count, dtype=torch.int64, device=device)
    broadcast(g, out, _TOKENS)
    if g.rank and (out == _REFUSED).any():
        raise ValueError("tokens: rank 0 has none, its own error says why")
    return out


def preparing_prompts(g: TPGroup) -> AbstractContextManager[None]:
    """What rank 0 does while the others are, or soon will be, in `broadcast_prompts`.

    An exception is raised there too, so that one bad prompt does not cost a timeout or the process: the group
    stays usable.
    """
    return _refusing(g, 1, _PROMPTS)


def choosing_tokens(g: TPGroup, count: int) -> AbstractContextManager[None]:
    """As `preparing_prompts`, for `broadcast_tokens`: sampling, and whatever the caller does with a token."""
    return _refusing(g, count, _TOKENS)


@contextmanager
def _refusing(g: TPGroup, count: int, where: str) -> Iterator[None]:
    try:
        yield
    except Exception:  # whatever it is, the ranks that wait must hear of it
        broadcast(g, torch.full((count,), _REFUSED, dtype=torch.int64, device=device_of(g)), where)
        raise


def _filled(values: list[int], count: int, device: torch.device) -> Tensor:
    if len(values) == count:
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.empty(count, dtype=torch.int64, device=device)
