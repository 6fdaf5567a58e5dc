"""Two machines, as network namespaces joined by a virtual cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

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


@contextmanager
def laid() -> Iterator[Cable]:
    """A cable for one test, which is skipped where there can be none."""
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    cable = Cable()
    try:
        cable.lay()
        yield cable
    finally:
        cable.remove()
