"""What an emulated launch leaves behind in the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cuda_volta import gate, norm

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_launches_keep_no_stacks() -> None:
    """A process may have 65530 mappings, and a block's stacks are two a thread."""
    x = torch.randn(4, 64).half()
    gate.swiglu(x)
    before = mappings()
    for _ in range(3):
        gate.swiglu(x)
        norm.rms_norm(x, torch.ones(64).half(), 1e-6)
    assert mappings() < before + 100
