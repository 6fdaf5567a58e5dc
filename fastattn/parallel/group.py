"""The ranks that share one model: start, threads, shutdown, and the end after a failure.

Ranks are started by torchrun, or by any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
The exchange library follows the device: gloo on CPUs, NCCL on CUDA, HCCL on NPUs (the last two are
untested here).
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from ..collectives.exchange import agree, idle, memories, reason_of, witnesses
from ..devices import device_named
from ..settings import settings
from ..shares import normalised, usable
from ..spec import REPORTED, SyncError, TPGroup, UnsupportedError
from ..threads import machine
from .interface import interface_towards
from .local import ranks_here, share_memory
from .rendezvous import meet
from .watch import Watch

_MOST_THREADS = 1024  # asked for; OpenMP dies where it cannot start them
_SHUTDOWN_S = 5.0  # milliseconds suffice unless an exchange still hangs
_BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}
_joined: list[TPGroup] = []  # the group this process is in
_watches: list[Watch] = []  # of it


def single() -> TPGroup:
    """The group of one rank: no process group, no communication."""
    return TPGroup(None, 0, 1, settings.timeout_s, (1.0,))


def init(
    timeout_s: float | None = None,
    split: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
) -> TPGroup:
    """Joins the ranks that the launcher's environment describes; `single()` when there is only one.

    ``timeout_s``: how long an exchange waits for another rank (default FASTATTN_TIMEOUT, 60 s).
    ``split``: share of the work of each rank, any positive numbers (default: equal).
    In a group already, a process gets the same one again, for what it leaves out and for what the group has.
    Raises ValueError for a wrong environment or split, or for a group unlike the one that this process is in;
    `SyncError` when ranks are missing or disagree.

    From here to `shutdown`, when the process of another rank ends without one, this process ends too, within
    seconds and with `abort`, should no exchange have raised `SyncError` and led to `shutdown` before.
    """
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s: {timeout_s}, expected seconds > 0")
    world = _integer("WORLD_SIZE", 1, lowest=1)
    rank = _integer("RANK", 0 if world == 1 else None, lowest=0)
    if rank >= world:
        raise ValueError(f"environment variable RANK={rank}: expected less than WORLD_SIZE={world}")
    weights = None if split is None else _weights(split, world)
    if _joined:
        backend = _backend(device_named(device))
        asked = {"WORLD_SIZE": world, "RANK": rank, "timeout_s": timeout_s, "split": weights}
        return _joined_already(_joined[0], backend=backend, **asked)
    timeout_s, weights = timeout_s or settings.timeout_s, weights or (1 / world,) * world
    if world == 1:
        return TPGroup(None, 0, 1, timeout_s, weights)
    if dist.is_initialized():
        raise ValueError(
            "torch.distributed has a process group already: fastattn joins the ranks with its own"
        )
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise ValueError(f"environment variable {name} is not set, WORLD_SIZE={world} ranks need it")
    host, port = os.environ["MASTER_ADDR"], _integer("MASTER_PORT", None, lowest=1)
    backend = _backend(device_named(device))
    network = _choose_interface(world) if backend == "gloo" else "chosen by " + backend
    try:
        _join(backend, rank, world, host, port, timeout_s)
    except (RuntimeError, OSError) as error:
        reason = reason_of(error, timeout_s)
        _leave(farewell=False)
        where = f"{world} ranks meet at {host}:{port}, network interface {network}"
        raise SyncError(rank, "start-up", f"{reason}; {where}") from error
    g = TPGroup(dist.group.WORLD, rank, world, timeout_s, weights)
    _joined.append(g)
    # gloo's threads must be idle before the interpreter ends, or the process aborts.
    atexit.register(_at_exit, g)
    agree(g, "the shares of work (split)", repr(weights).encode())
    if memory := share_memory(g):
        memories[g.pg] = memory
    return g


def _join(backend: str, rank: int, world: int, host: str, port: int, timeout_s: float) -> None:
    store = meet(host, port, rank, world, timeout_s)

    def on_loss(lost: int) -> None:
        abort(None, SyncError(rank, "watch", f"rank {lost} ended"))

    watch = Watch(rank, world, store, host, timeout_s, on_loss)
    _watches.append(watch)
    witnesses.append(watch.first_lost)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, timeout=timeout, rank=rank, world_size=world)


def _joined_already(g: TPGroup, **asked: object) -> TPGroup:
    """``g``, which this process is in; ValueError unless it has what is asked for (None: whatever it has)."""
    has = {
        "WORLD_SIZE": g.world, "RANK": g.rank, "backend": dist.get_backend(g.pg), "timeout_s": g.timeout_s,
        "split": g.weights,
    }  # fmt: skip
    for name, wish in asked.items():
        if wish not in (None, has[name]):
            raise ValueError(
                f"{name}: {wish}, this process is in a group with {has[name]} until its shutdown"
            )
    return g


def _leave(*, farewell: bool) -> None:
    _joined.clear()
    witnesses.clear()
    while _watches:
        _watches.pop().leave(farewell=farewell)


def shutdown(g: TPGroup) -> bool:
    """Leaves the group. Returns False, after at most 12 s, if an exchange still hangs in it.

    A process that gets False must end with `abort`: its normal exit could hang too.
    """
    if g.pg is None or not dist.is_initialized():
        return True
    if not idle(_SHUTDOWN_S):
        return False
    _leave(farewell=True)
    thread = threading.Thread(target=dist.destroy_process_group, daemon=True)
    thread.start()
    thread.join(_SHUTDOWN_S)
    return not thread.is_alive()


def abort(g: TPGroup | None, error: BaseException) -> NoReturn:
    """Prints ``error`` on stderr and ends the process at once with status 1. ``g``: None before there is one.

    No destructor runs, so nothing can hang, and the closing sockets make the other ranks fail too.
    """
    text = str(error) if isinstance(error, REPORTED) else f"{type(error).__name__}: {error}"
    prefix = "" if g is None or g.world == 1 or isinstance(error, SyncError) else f"rank {g.rank}: "
    try:
        if threading.current_thread() is threading.main_thread():  # which may else be held up writing to it
            with suppress(OSError, ValueError, AttributeError):  # nobody reads it any more, or it is closed
                sys.stdout.flush()
        print(f"fastattn: error: {prefix}{text}", file=sys.stderr, flush=True)
    finally:  # also where nobody reads stderr
        os._exit(1)


class Threads(NamedTuple):
    """How many threads this rank computes with, and why."""

    num: int
    why: str


def set_threads(g: TPGroup, threads: int | None = None) -> Threads:
    """Sets torch's threads: ``threads``, or OMP_NUM_THREADS, or what this machine gives (`threads.py`)
    over its ranks.

    torchrun sets OMP_NUM_THREADS=1 by itself, which cannot be told from a user's; under torchrun a 1 is
    therefore not taken as a wish. Collective: all ranks call it.
    """
    ranks = _local_world(g)
    environment = os.environ.get("OMP_NUM_THREADS", "")
    from_torchrun = environment == "1" and "TORCHELASTIC_RUN_ID" in os.environ
    if threads is not None:
        most = max(_MOST_THREADS, os.cpu_count() or 1)
        if not 1 <= threads <= most:
            raise ValueError(f"threads: {threads}, expected at least 1 and at most {most}")
        chosen = Threads(threads, "asked for")
    elif environment and not from_torchrun:
        chosen = Threads(torch.get_num_threads(), f"OMP_NUM_THREADS={environment}")
    else:
        here = machine()
        why = f"{here} for {ranks} rank{'s' * (ranks > 1)} here"
        chosen = Threads(max(1, here.threads // ranks), why)
    torch.set_num_threads(chosen.num)
    return chosen


def ranks_of(tp: str | TPGroup | None, device: torch.device | str = "cpu") -> TPGroup:
    """What ``tp`` means: "auto" joins the launcher's ranks, each with its share of this machine's threads;
    a group is itself; None is this process alone. ``device`` and errors as for `init`.
    """
    if tp == "auto":
        g = init(device=device)
        set_threads(g)
        return g
    if isinstance(tp, str):
        raise ValueError(f"tp: {tp!r}, expected auto, a TPGroup or None")  # noqa: TRY004 (a wrong word)
    return tp or single()


def _local_world(g: TPGroup) -> int:
    """Ranks on this machine: torchrun says so, otherwise the ranks compare their machines' identities."""
    if "LOCAL_WORLD_SIZE" in os.environ or g.world == 1:
        return _integer("LOCAL_WORLD_SIZE", 1, lowest=1)
    return ranks_here(g)


def _at_exit(g: TPGroup) -> None:
    """The end of a process that did not call `shutdown`; no thread can be started any more."""
    if not dist.is_initialized():
        return
    if not idle(_SHUTDOWN_S):
        abort(g, SyncError(g.rank, "exit", f"an exchange still hangs after {_SHUTDOWN_S:g} s"))
    _leave(farewell=True)
    dist.destroy_process_group()


def _backend(device: torch.device) -> str:
    if device.type not in _BACKENDS:
        raise UnsupportedError(f"device: {device}, tensor parallelism runs on {', '.join(_BACKENDS)}")
    if device.type != "cpu":
        index = _integer("LOCAL_RANK", 0, lowest=0) if device.index is None else device.index
        getattr(torch, device.type).set_device(index)
    return _BACKENDS[device.type]


def _choose_interface(world: int) -> str:
    """The interface gloo listens on: the user's, or the one that leads to MASTER_ADDR.

    gloo alone takes the address that the host's own name resolves to, often a loopback one that other
    machines cannot reach.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return os.environ["GLOO_SOCKET_IFNAME"] + " (GLOO_SOCKET_IFNAME)"
    found = interface_towards(os.environ["MASTER_ADDR"])
    several_machines = _integer("LOCAL_WORLD_SIZE", world, lowest=1) < world
    if found is None or (found == "lo" and several_machines):
        return "of this host's name (set GLOO_SOCKET_IFNAME to choose)"
    os.environ["GLOO_SOCKET_IFNAME"] = found
    return found + " (towards MASTER_ADDR)"


def _integer(name: str, default: int | None, lowest: int, environ: Mapping[str, str] = os.environ) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if value < lowest:
        raise ValueError(f"environment variable {name}={text!r}: expected an integer >= {lowest}")
    return value


def _weights(split: Sequence[float], world: int) -> tuple[float, ...]:
    if len(split) != world:
        raise ValueError(f"split: {len(split)} shares {tuple(split)} for {world} ranks")
    if not usable(split):
        raise ValueError(f"split: {tuple(split)}, expected positive numbers")
    return normalised(split)
