"""Errors of any command: one message on stderr, exit status 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.forks import Forks

FULL_CACHE = """
import sys
from fastattn import CacheFull, cli

def full(args):
    raise CacheFull("no room")

cli.info.main = full
sys.exit(cli.main(["info"]))
"""


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("FASTATTN_STRICT", "maybe", "expected 0 or 1"),
        (
            "FASTATTN_BACKEND",
            "nope",
            "no backend 'nope'; there are: volta, ascend, triton, cpu, sdpa, reference",
        ),
    ],
)
def test_environment(name: str, text: str, reason: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", "info"], env={**os.environ, name: text}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    message = f"fastattn: error: environment variable {name}='{text}': {reason}\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_argument(forks: Forks) -> None:
    done = forks.run("info", "--why", "fast")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fastattn: error: --why: 'fast', expected one of q, k,")
    assert len(done.stderr.splitlines()) == 1


def test_full_cache() -> None:
    """Whichever command it is."""
    done = subprocess.run([sys.executable, "-c", FULL_CACHE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "fastattn: error: no room\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastattn", "info"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "fastattn: error: [Errno 28] No space left on device\n"
