"""What the ranks of one machine have in common: its processors and its memory."""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import dispatch
from ..collectives.exchange import all_gather, broadcast, device_of, first_lost
from ..settings import settings
from ..spec import TPGroup

if TYPE_CHECKING:
    from ..collectives.shared_memory import SharedMemory

_WHERE = "start-up of shared memory"
_NAME = "fastattn-ranks"
_TOKEN_BYTES = 16  # at the memory's end: a path may mean another file to a process in another container
_OFFER_BYTES = 256


def ranks_here(g: TPGroup) -> int:
    """How many ranks run on this machine; all ranks call it."""
    mine = torch.tensor(list(identity()), dtype=torch.uint8, device=device_of(g))
    return sum(
        torch.equal(mine, other) for other in all_gather(g, mine, "start-up count of ranks per machine")
    )


def share_memory(g: TPGroup) -> SharedMemory | None:
    """Memory that all ranks have mapped, for groups on the CPUs of one machine; all ranks call it.

    None, on every rank, where one of them cannot have it: on another machine or in another network namespace
    (what travels between those is meant to travel), as another user, or with FASTATTN_SHARED_MEMORY=0.
    """
    if g.world == 1 or device_of(g).type != "cpu":
        return None
    usable = settings.shared_memory and not dispatch.unavailable("cpu")
    offer, file = torch.zeros(_OFFER_BYTES, dtype=torch.uint8), None
    if g.rank == 0 and usable:
        from ..collectives.shared_memory import SharedMemory  # loads the native kernels

        file, text = offered(SharedMemory.bytes_for(g.world))
        offer[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    try:
        broadcast(g, offer, _WHERE)
        memory = mapped(bytes(offer.tolist()).rstrip(b"\0")) if usable else None
        have = torch.tensor([memory is not None], dtype=torch.uint8)
        if not all(int(x) for x in all_gather(g, have, _WHERE)) or memory is None:
            return None
    finally:
        if file is not None:
            os.close(file)  # the memory lives as long as somebody has it mapped
    from ..collectives.shared_memory import SharedMemory

    return SharedMemory(g.rank, g.world, g.timeout_s, memory, partial(first_lost, 0.0))


def offered(size: int) -> tuple[int | None, bytes]:
    """A file without a name, of zeros and a token, and how another process of this machine finds it."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return None, b""
    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        file = os.memfd_create(_NAME)
        os.truncate(file, size + _TOKEN_BYTES)
        os.pwrite(file, token, size)
    except OSError:
        return None, b""
    words = (identity(network=True).hex(), f"/proc/{os.getpid()}/fd/{file}", token.hex())
    return file, " ".join(words).encode()


def mapped(offer: bytes) -> mmap.mmap | None:
    """The memory of an offer; None where this process cannot have it."""
    if not offer:
        return None
    machine, path, token = offer.decode().split()
    if machine != identity(network=True).hex():
        return None
    try:
        # Elsewhere the path may lead to any file: it is opened only if it is such memory.
        if not str(Path(path).readlink()).startswith(f"/memfd:{_NAME}"):
            return None
        file = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(file, 0)
        finally:
            os.close(file)
    except (OSError, ValueError):
        return None
    return memory if memory[-_TOKEN_BYTES:] == bytes.fromhex(token) else None


def identity(*, network: bool = False) -> bytes:
    """32 bytes that processes have in common on one machine only, or in one network namespace of it."""
    parts = [platform.node().encode()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_bytes())
        if network:
            parts.append(str(Path("/proc/self/ns/net").stat().st_ino).encode())
    return hashlib.sha256(b"\0".join(parts)).digest()
