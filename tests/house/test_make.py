"""The Makefile's prerequisites explain themselves, its targets are listed, and CI's budget adds up."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from .markdown import ROOT


def prerequisites(
    python: str = sys.executable, gigabytes: int = 0, torch: str = "torch", **env: str
) -> tuple[int, str]:
    done = subprocess.run(
        [str(ROOT / ".ci/prerequisites"), python, str(gigabytes), torch],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_this_machine_has_them() -> None:
    status, said = prerequisites()
    assert status == 0, said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"python": "no-such-python"}, "'no-such-python' was not found", id="python"),
        pytest.param({"CXX": "no-such-c++ -O2"}, "compiler 'no-such-c++ -O2' was not found", id="g++"),
        pytest.param({"gigabytes": 10**8}, "100000000 GB are needed", id="disk"),
    ],
)
def test_missing_one_is_named(given: dict[str, str], expected: str) -> None:
    status, said = prerequisites(**given)  # type: ignore[arg-type]
    assert status == 1
    assert expected in said
    assert "Then run make again" in said


def test_all_problems_are_named_at_once() -> None:
    _, said = prerequisites("no-such-python", 10**8, CXX="no-such-compiler")
    assert said.count("  - ") == 3
    assert said.count("sudo apt-get install") == 2


@pytest.mark.parametrize("version", ["3.9", "3.14"])
def test_other_python_versions_are_refused(tmp_path, version: str) -> None:  # type: ignore[no-untyped-def]
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    status, said = prerequisites(str(python))
    assert status == 1
    assert f"is Python {version}; 3.10 to 3.13 is needed" in said


@pytest.mark.parametrize(
    ("gpu", "torch", "noted"),
    [
        ("7.0", "torch==2.13.0", True),
        ("7.2", "torch==2.13.0", True),
        ("7.0", "torch==2.10.0", False),
        ("7.0", "torch", False),  # the machine's own
        ("7.5", "torch==2.13.0", False),
    ],
)
def test_owners_of_a_volta_learn_which_torch_serves_it(tmp_path, gpu: str, torch: str, noted: bool) -> None:  # type: ignore[no-untyped-def]
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text(f"#!/bin/sh\necho {gpu}\n")
    nvidia_smi.chmod(0o755)
    status, said = prerequisites(torch=torch, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 0
    assert ("make setup TORCH='torch==2.10.0'" in said) == noted


def test_help_lists_every_target() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True)
    for target in ("setup", "bench", "test", "test-all", "bench-peers", "lint", "wheel", "clean"):
        assert re.search(rf"^  make {target} ", done.stdout, re.MULTILINE), target


def test_ci_stays_within_its_budget() -> None:
    minutes = re.findall(r"^part \w+ (\d+) ", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert len(minutes) >= 3
    assert sum(map(int, minutes)) <= 80
