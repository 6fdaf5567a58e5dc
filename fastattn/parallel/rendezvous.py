"""Where the ranks meet: a store of keys and values that rank 0 serves, or torchrun's agent.

torchrun starts the ranks anew with the store of the attempt before, and a process may join again after it
left. What an earlier group wrote names ports where nobody listens any more, so each joining has its own keys.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist


def meet(host: str, port: int, rank: int, world: int, timeout_s: float) -> Any:
    """The store of the group that the ranks now join, each for the same time; RuntimeError when it cannot be
    reached.
    """
    store = _store(host, port, rank, world, timeout_s)
    attempt = f"fastattn/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    times = store.add(f"{attempt}/times that rank {rank} joined", 1)
    return dist.PrefixStore(f"{attempt}/{times}", store)  # type: ignore[attr-defined]


@cache  # a rank that joins again may be faster than rank 0, which must not end what it reaches
def _store(host: str, port: int, rank: int, world: int, timeout_s: float) -> Any:
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Without waiting for all ranks, as torch's own rendezvous would: until they watch each other, one that
    # ends goes unnoticed.
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, world, is_master=rank == 0 and not torchruns, timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False, multi_tenant=not torchruns,
    )  # fmt: skip
