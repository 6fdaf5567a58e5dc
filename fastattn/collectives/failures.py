"""A failure on some ranks becomes one on all, before any of them waits for those that have failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..spec import TPGroup
from .exchange import all_gather, device_of


@contextmanager
def everywhere(g: TPGroup, error: type[Exception], what: str) -> Iterator[None]:
    """A block that may raise ``error`` on any rank: then every rank raises it, and the group stays usable.

    Collective at the block's end. ``what`` the block makes is for the others' message.
    """
    own = None
    try:
        yield
    except error as raised:
        own = raised
    mine = torch.tensor([own is not None], dtype=torch.uint8, device=device_of(g))
    failed = [rank for rank, flag in enumerate(all_gather(g, mine, what)) if flag]
    if own is not None:
        raise own
    if failed:
        raise error(f"{what}: failed on rank {failed[0]}, whose own error says why")
