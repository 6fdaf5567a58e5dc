"""How many threads can compute here at once: cores, the scheduler's mask, the cgroup's share of time.

One thread a physical core: the kernels keep a core's multipliers or its path to memory busy, and a second
hardware thread shares both. Where a cgroup grants less time than that, as containers do, more threads than
CPUs' worth of time are all stopped for the rest of each period once it is spent.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

#: What else decides where OpenMP's threads run and how they wait.
OPENMP_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


class Machine(NamedTuple):
    """What this process may use of the machine."""

    cpus: int  # logical processors of its mask
    cores: int  # physical cores that they belong to
    quota: float | None  # CPUs' worth of time that the cgroup grants
    nodes: int  # NUMA nodes that they belong to
    huge_pages: str  # transparent ones: "always", "madvise", "never", or "" where unknown

    @property
    def threads(self) -> int:
        """That can compute at once."""
        return self.cores if self.quota is None else min(self.cores, max(1, int(self.quota)))

    def __str__(self) -> str:
        parts = [_count(self.cores, "core")]
        if self.cpus != self.cores:
            parts.append(f"{self.cpus} hardware threads")
        if self.quota is not None:
            parts.append(f"a cgroup quota of {self.quota:g} CPUs")
        if self.nodes > 1:
            parts.append(f"{self.nodes} NUMA nodes")
        return ", ".join(parts)


def machine(root: Path = Path("/"), cpus: Iterable[int] | None = None) -> Machine:
    """Reads /proc and /sys under ``root``; ``cpus``: the mask, by default this process's own."""
    mask = _mask() if cpus is None else frozenset(cpus)
    devices = root / "sys/devices/system"
    siblings = {_read(devices / f"cpu/cpu{n}/topology/thread_siblings_list") or str(n) for n in mask}
    nodes = [p for p in (devices / "node").glob("node[0-9]*/cpulist") if mask & set(_listed(_read(p)))]
    huge = _read(root / "sys/kernel/mm/transparent_hugepage/enabled")
    return Machine(
        len(mask), len(siblings), _quota(root), max(1, len(nodes)), huge.partition("[")[2].partition("]")[0]
    )


def compute_on_one_thread() -> None:
    """Keeps torch's and our own operations of the calling thread on it."""
    from .native import kernels

    kernels.compute_on_one_thread()


def _mask() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _listed(text: str) -> Iterator[int]:
    """Numbers of "0-3,8,10-11"."""
    for part in text.split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            yield from range(int(first), int(last or first) + 1)


def _quota(root: Path) -> float | None:
    """The least that this process's cgroup or one above it grants; None without a limit."""
    quotas = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        hierarchy = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        here = hierarchy / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(hierarchy):
                break
            limit = _read(folder / "cpu.max").split()  # version 2: "max 100000" or "150000 100000"
            if controllers:
                limit = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            with suppress(ValueError, ZeroDivisionError):
                quota, period = map(int, limit)
                if quota > 0:
                    quotas.append(quota / period)
    return min(quotas, default=None)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
