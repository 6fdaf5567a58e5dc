"""Ranks that end while the others are not exchanging anything: in start-up, loading, computing."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch.distributed as dist

from fastattn.parallel.watch import Watch
from tests.parallel.ranks import Ranks, free_port

HOST = "127.0.0.1"

BUSY = """
import torch
from fastattn.parallel import group
group.init(60)
print("ready", flush=True)
x = torch.ones(500, 500)
while True:
    x = x @ x / 500
"""

JOINING = """
import torch.distributed as dist
from fastattn.parallel import group
join = dist.init_process_group
def announced(*arguments, **options):
    print("ready", flush=True)  # the ranks watch each other, and join exchanges the last one is missing from
    join(*arguments, **options)
dist.init_process_group = announced
try:
    group.init(60)
except group.SyncError as error:
    group.abort(group.single(), error)
"""


@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("program", "missing"), [(BUSY, 0), (JOINING, 1)], ids=["busy", "start-up"])
def test_killed_rank_ends_the_others_within_5_s(
    victim: int, program: str, missing: int, tmp_path: Path
) -> None:
    file = tmp_path / "program.py"
    file.write_text(program)
    with Ranks(file, [], 3 + missing, tmp_path, start=[0, 1, 2]) as ranks:
        ranks.until("ready")
        assert all(f"rank {victim} ended" in ranks.err(rank) for rank in ranks.kill(victim))


class Heard:
    """Three watches in one process, and what each was told."""

    def __init__(self) -> None:
        self.port = free_port()
        self.store = dist.TCPStore(HOST, self.port, is_master=True, wait_for_workers=False)
        self.lost: dict[int, int] = {}
        self.told = threading.Semaphore(0)
        self.watches = [self._watch(rank) for rank in range(3)]

    def _watch(self, rank: int) -> Watch:
        def on_loss(lost: int) -> None:
            self.lost[rank] = lost
            self.told.release()

        return Watch(rank, 3, self.store, HOST, 10, on_loss)


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard = Heard()
    yield heard
    for watch in heard.watches:
        watch.leave(farewell=True)


def test_everyone_learns_who_was_lost(heard: Heard) -> None:
    heard.watches.pop(1).leave(farewell=False)
    assert [watch.first_lost(4) for watch in heard.watches] == [1, 1]
    for _ in range(2):
        assert heard.told.acquire(timeout=4)
    assert heard.lost == {0: 1, 2: 1}


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_farewell_is_no_loss(heard: Heard, rank: int) -> None:
    heard.watches.pop(rank).leave(farewell=True)
    assert not heard.told.acquire(timeout=3)
    assert heard.lost == {}


def test_one_who_leaves_in_time_is_not_told(heard: Heard) -> None:
    heard.watches.pop(2).leave(farewell=False)
    heard.watches.pop(1).leave(farewell=True)
    assert heard.told.acquire(timeout=4)
    assert not heard.told.acquire(timeout=0.5)
    assert heard.lost == {0: 2}


def test_no_descriptor_left_is_not_the_end_of_the_watch() -> None:
    store = dist.TCPStore(HOST, free_port(), is_master=True, wait_for_workers=False)
    told = threading.Event()
    first = Watch(0, 2, store, HOST, 10, lambda lost: told.set())
    port = int(store.get("watch").decode().split()[0])
    with socket.socket() as stranger, every_descriptor():
        stranger.connect((HOST, port))
        time.sleep(0.3)
    second = Watch(1, 2, store, HOST, 10, lambda lost: told.set())
    second.leave(farewell=False)
    assert told.wait(6)
    first.leave(farewell=True)


@contextmanager
def every_descriptor() -> Iterator[None]:
    """This process can open none meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as taken:
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        taken.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        with suppress(OSError):
            while True:
                taken.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


def test_strangers_are_not_ranks() -> None:
    store = dist.TCPStore(HOST, free_port(), is_master=True, wait_for_workers=False)
    told = threading.Event()
    first = Watch(0, 2, store, HOST, 10, lambda lost: told.set())
    port = int(store.get("watch").decode().split()[0])
    with socket.create_connection((HOST, port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n\r\n")
        assert stranger.recv(1) == b"", "turned away"
    second = Watch(1, 2, store, HOST, 10, lambda lost: told.set())
    assert not told.wait(2.5)
    with pytest.raises(ConnectionRefusedError):  # all are here
        socket.create_connection((HOST, port))
    second.leave(farewell=False)
    assert told.wait(4)
    first.leave(farewell=True)
