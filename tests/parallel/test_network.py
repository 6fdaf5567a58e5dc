"""Two machines, as network namespaces joined by a virtual cable: they work, and notice when it is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.parallel.ranks import HERE, Ranks

LOOP = HERE / "loop.py"
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def obstacle() -> str:
    """Why namespaces cannot be made here; "" when they can."""
    if shutil.which("ip") is None:
        return "needs the program `ip` (Debian package iproute2)"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    name = f"fa{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, text=True)
    if done.returncode:
        return f"cannot make network namespaces: {done.stderr.strip()}"
    ip("netns", "del", name)
    return ""


class Cable:
    """Namespaces ``names`` with interfaces ``ends``."""

    def __init__(self) -> None:
        self.names = [f"fa{os.getpid()}n{i}" for i in (0, 1)]
        self.ends = [f"fa{os.getpid()}v{i}" for i in (0, 1)]
        self.prefix = [("ip", "netns", "exec", name) for name in self.names]

    def lay(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for name, end, address in zip(self.names, self.ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", self.ends[1], "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


pytestmark = pytest.mark.net


@pytest.fixture
def cable() -> Iterator[Cable]:
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    cable = Cable()
    try:
        cable.lay()
        yield cable
    finally:
        cable.remove()


@pytest.mark.parametrize("named", [True, False], ids=["GLOO_SOCKET_IFNAME", "found"])
def test_two_machines(cable: Cable, named: bool, tmp_path: Path) -> None:
    """With the interface named by the user, and found by us: a host's own name leads to loopback here."""
    per_rank = [{"GLOO_SOCKET_IFNAME": end if named else "", "LOCAL_WORLD_SIZE": "1"} for end in cable.ends]
    with Ranks(
        LOOP, ["all_reduce", "20", "0.5"], 2, tmp_path,
        per_rank=per_rank, prefix=cable.prefix, address=ADDRESSES[0],
    ) as ranks:  # fmt: skip
        assert ranks.wait(60) == {0: 0, 1: 0}, ranks.everything()
        assert "done" in ranks.out(1)


@pytest.mark.parametrize("kind", ["all_reduce", "sampling"])
def test_cut_cable_ends_both_within_the_timeout(cable: Cable, kind: str, tmp_path: Path) -> None:
    """Packets vanish without any sign: only the timeout, 5 s here, can tell."""
    with Ranks(
        LOOP, [kind, "5"], 2, tmp_path,
        env={"START": "start"}, prefix=cable.prefix, address=ADDRESSES[0],
    ) as ranks:  # fmt: skip
        ranks.release()
        ranks.until("ready")
        begin = time.monotonic()
        cable.cut()
        codes = ranks.wait(7)
        assert time.monotonic() - begin > 4
        assert codes == {0: 1, 1: 1}, ranks.everything()
        for rank in codes:
            assert f"fastattn: error: rank {rank}: " in ranks.err(rank)
            assert "no answer within 5 s" in ranks.err(rank)
