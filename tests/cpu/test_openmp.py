"""Threads: torch's OpenMP runtime is the only one, its thread count rules, and the GIL is free meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastattn

CALL = """
import os, torch, fastattn
q, k = torch.randn(1, 300, 4, 64), torch.randn(1, 600, 2, 64)
def call():
    return fastattn.attention(q, k, k, backend="cpu")
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALL + code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_openmp_runtime() -> None:
    code = """
torch.set_num_threads(2)
call()
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
names = ("libgomp", "libomp", "libiomp")
print(len({line.split()[-1] for line in open("/proc/self/maps") if any(n in line for n in names)}))
"""
    assert run(code) == "1"


def test_thread_count_is_obeyed() -> None:
    code = """
torch.set_num_threads(1)
call(); before = tasks(); call(); one = tasks()
torch.set_num_threads(3)
call(); three = tasks()
print(one - before, three - before)
"""
    assert run(code) == "0 2"


def test_child_of_fork_works() -> None:
    """A child does not have its parent's pool: it must compute on one thread, not wait for ever."""
    code = """
torch.set_num_threads(2)
expected = call().numpy()
pid = os.fork()
if pid == 0:  # numpy compares: torch's own parallel operations would hang here
    os._exit(0 if abs(call().numpy() - expected).max() < 1e-6 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(code) == "0"


@pytest.mark.parametrize("threads", [1, 2])
def test_concurrent_callers(threads: int) -> None:
    """Callers on several Python threads get their own results."""
    torch.set_num_threads(threads)
    inputs = [tuple(torch.randn(1, n, 4, 40) for n in (50 + i, 90 + i, 90 + i)) for i in range(24)]
    alone = [fastattn.attention(*x, causal=True, backend="cpu") for x in inputs]

    def call(x: tuple[torch.Tensor, ...]) -> torch.Tensor:
        torch.set_num_threads(threads)  # torch keeps the count per thread
        return fastattn.attention(*x, causal=True, backend="cpu")

    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for ours, expected in zip(pool.map(call, inputs), alone, strict=True):
                assert torch.equal(ours, expected)


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="needs two cores: one computes, the other one counts"
)
def test_gil_is_released() -> None:
    torch.set_num_threads(1)
    q = torch.randn(1, 3000, 8, 64)
    ticks, running = 0, True

    def count() -> None:
        nonlocal ticks
        while running:
            ticks += 1
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        time.sleep(0.05)
        before, start = ticks, time.perf_counter()
        fastattn.attention(q, q, q, backend="cpu")
        seconds, during = time.perf_counter() - start, ticks - before
    finally:
        running = False
        counter.join()
    assert seconds > 0.05, "too quick to tell"
    assert during > 10
