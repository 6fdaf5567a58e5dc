"""Tests marked ``emulate("triton")`` run their kernels emulated where the device is absent.

Whether a backend is emulated is settled when Python starts (FASTATTN_EMULATE, and Triton's interpreter), so
the marked tests of a file run together in one child process, and each reports here what came of it there.
In a process that emulates already they run as any other test; so do those marked `gpu` with the device
present: the others' tensors are on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch

from fastattn.settings import settings

_DEVICE_OF = {"triton": "cuda", "volta": "cuda", "ascend": "npu"}


def device_present(backend: str) -> bool:
    """Whether the backend's own kind of device is here."""
    kind = getattr(torch, _DEVICE_OF[backend], None)
    return kind is not None and kind.is_available()


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Sends marked tests to a child process, where this one cannot run them."""
    children: dict[tuple[Path, str], Child] = {}
    for item in items:
        mark = item.get_closest_marker("emulate")
        if mark is None or not needs_child(item, mark.args[0]):
            continue
        key = (item.path, mark.args[0])
        child = children.setdefault(key, Child(session, mark.args[0]))
        child.wanted.append(item)
        item.runtest = partial(child.report, item)  # type: ignore[method-assign]


def needs_child(item: pytest.Item, backend: str) -> bool:
    """Whether this process cannot run the item: it neither emulates nor has a device that the item uses."""
    on_device = device_present(backend) and item.get_closest_marker("gpu") is not None
    return backend not in settings.emulate and not on_device


class Child:
    """One pytest process for the tests of one file and one backend; starts when the first is due."""

    def __init__(self, session: pytest.Session, backend: str) -> None:
        self.session, self.backend = session, backend
        self.wanted: list[pytest.Item] = []
        self.outcomes: dict[str, list[ET.Element]] | None = None
        self.output = ""

    def report(self, item: pytest.Item) -> None:
        """Passes, skips or fails as the test did in the child."""
        if self.outcomes is None:
            self.outcomes = self._run()
        found = self.outcomes.get(_key(item))
        if found is None:
            pytest.fail(
                f"the child process did not run it:\n{self.output[:2000]}\n...\n{self.output[-2000:]}",
                pytrace=False,
            )
        for outcome in found:
            if outcome.tag == "skipped":
                pytest.skip(outcome.get("message", ""))
            if outcome.tag in ("failure", "error"):
                pytest.fail(outcome.text or "", pytrace=False)

    def _run(self) -> dict[str, list[ET.Element]]:
        selected = set(self.session.items)  # what -k and -m left
        names = [item.nodeid for item in self.wanted if item in selected]
        environ = os.environ | {"FASTATTN_EMULATE": self.backend, "TRITON_INTERPRET": "1"}
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", "-q"]
            done = subprocess.run(
                [*command, f"--junitxml={report}", *names],
                env=environ, cwd=self.session.config.rootpath, check=False, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.output = done.stdout
            outcomes: dict[str, list[ET.Element]] = defaultdict(list)
            if report.exists():
                for case in ET.parse(report).iter("testcase"):  # noqa: S314
                    outcomes[f"{case.get('classname')} {case.get('name')}"] += list(case)
        return dict(outcomes)


def _key(item: pytest.Item) -> str:
    """A test as junit's XML names it."""
    path, bracket, parameters = item.nodeid.partition("[")
    file, *names = path.split("::")
    module = file.removesuffix(".py").replace("/", ".")
    return f"{'.'.join((module, *names[:-1]))} {names[-1]}{bracket}{parameters}"
