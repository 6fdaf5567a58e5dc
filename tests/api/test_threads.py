"""How many threads can compute: trees of /proc and /sys as Linux shows them on other machines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn import threads
from fastattn.cli import info
from fastattn.threads import Machine, machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def smt(cores: int) -> dict[str, str]:
    """Hardware threads n and n + cores share a core."""
    return {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % cores},{n % cores + cores}"
        for n in range(2 * cores)
    }


NODES = {
    "sys/devices/system/node/node0/cpulist": "0-3,8-11",
    "sys/devices/system/node/node1/cpulist": "4-7,12-15",
    "sys/devices/system/node/online": "0-1",
}


def v2(**limits: str) -> dict[str, str]:
    """A process in /user/app: the cpu.max of its folder, of the one above and of the mount."""
    folders = {"app": "user/app/", "user": "user/", "mount": ""}
    files = {f"sys/fs/cgroup/{folders[name]}cpu.max": text for name, text in limits.items()}
    return {"proc/self/cgroup": "0::/user/app", **files}


def v1(quota: str, period: str) -> dict[str, str]:
    folder = "sys/fs/cgroup/cpu/app/cpu.cfs"
    cgroup = {"proc/self/cgroup": "9:memory:/app\n4:cpu,cpuacct:/app\n0::/"}
    return cgroup | {f"{folder}_quota_us": quota, f"{folder}_period_us": period}


PAGES = {"sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never"}


@pytest.mark.parametrize(
    ("files", "cpus", "expected", "count"),
    [
        ({}, range(4), Machine(4, 4, None, 1, ""), 4),
        (smt(8) | NODES | PAGES, range(16), Machine(16, 8, None, 2, "madvise"), 8),
        (smt(8) | NODES, (0, 1, 2, 3), Machine(4, 4, None, 1, ""), 4),
        (smt(8) | NODES, (0, 8, 1, 9), Machine(4, 2, None, 1, ""), 2),
        (v2(app="250000 100000"), range(8), Machine(8, 8, 2.5, 1, ""), 2),
        (v2(app="max 100000"), range(8), Machine(8, 8, None, 1, ""), 8),
        # The group above grants less, and half a CPU still runs one thread.
        (v2(app="400000 100000", user="50000 100000"), range(8), Machine(8, 8, 0.5, 1, ""), 1),
        # In a container the path is often the host's, and only the mount's own folder is visible.
        (v2(mount="300000 100000"), range(8), Machine(8, 8, 3.0, 1, ""), 3),
        (v2(mount="1600000 100000"), range(4), Machine(4, 4, 16.0, 1, ""), 4),
        (v1("150000", "50000"), range(8), Machine(8, 8, 3.0, 1, ""), 3),
        (v1("-1", "100000"), range(8), Machine(8, 8, None, 1, ""), 8),
    ],
    ids=["none", "SMT", "node", "pairs", "v2", "max", "above", "mount", "wide", "v1", "v1 max"],
)  # fmt: skip
def test_machine(tmp_path: Path, files: dict[str, str], cpus: object, expected: Machine, count: int) -> None:
    found = machine(tree(tmp_path, files), cpus)  # type: ignore[arg-type]
    assert (found, found.threads) == (expected, count)


def test_words() -> None:
    assert str(Machine(2, 2, None, 1, "")) == "2 cores"
    text = "8 cores, 16 hardware threads, a cgroup quota of 2.5 CPUs, 2 NUMA nodes"
    assert str(Machine(16, 8, 2.5, 2, "")) == text
    assert str(Machine(1, 1, None, 1, "")) == "1 core"


def test_this_machine() -> None:
    here = machine()
    assert 1 <= here.threads <= here.cores <= here.cpus


def test_info_states_what_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + machine().threads)
        lines = info.report().splitlines()
    finally:
        torch.set_num_threads(before)
    assert any(line.split() == ["OMP_WAIT_POLICY", "'passive'"] for line in lines)
    for name in threads.OPENMP_VARIABLES:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1
    (line,) = [line for line in lines if line.startswith("threads ")]
    assert f"fastattn generate takes {machine().threads} " in line
    assert "more than can compute at once" in line
    assert any(line.startswith("usable ") and str(machine()) in line for line in lines)
