"""What the tests of the Ascend kernels start from: Triton's interpreter, and the vendor's toolchain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ascend_ops import launch
from ascend_ops.router import chip_of
from fastattn.backends import ascend
from fastattn.backends.interpreter import reasons_against_emulating

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> None:
    """Before anything imports Triton: kernels are interpreted in a process that emulates."""
    assert not reasons_against_emulating("ascend")


@pytest.fixture(scope="session")
def vendor_python() -> Path:
    """Python of the environment that has triton-ascend and ascendnpu-ir."""
    python = ROOT / ".venv-ascend" / "bin" / "python"
    if not python.exists():
        pytest.skip(
            "NOT CHECKED AGAINST THE VENDOR'S COMPILER: no .venv-ascend (`make ascend-tools` creates it)"
        )
    return python


@pytest.fixture
def on_chip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that this process has an NPU of the family, and triton-ascend; nothing runs on it."""

    def be(family: str) -> None:
        monkeypatch.setattr(launch, "has_triton_ascend", lambda: True)
        monkeypatch.setattr(ascend.router, "current", lambda: chip_of(family))
        monkeypatch.setattr(ascend, "_EMULATED", False)

    return be
