"""Every barrier of the kernels is needed: without it the emulator finds a race, or memory read too early."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cuda_volta import decode, linear, norm, prefill
from cuda_volta.attention_params import AttentionCall
from cuda_volta.emulator import EmulatedKernel, EmulationError, build
from cuda_volta.variant import KERNELS, Variant
from tests.ops.weights import make

from .weights import grouped

pytestmark = pytest.mark.toolchain


def attend(function: Callable[[AttentionCall], object], rows: int, head_dim: int, keys: int = 200) -> None:
    q = torch.randn(1, rows, 8, head_dim).half()
    k, v = (torch.randn(1, keys, 1, head_dim).half() for _ in range(2))
    function(AttentionCall(q, k, v, 0.1, causal=True, alibi_slopes=torch.rand(8), return_lse=True))


#: Calls of the wrappers that between them reach every barrier of a source.
CALLS: dict[str, Callable[[], object]] = {
    "prefill": lambda: [attend(prefill.prefill, 200, d) for d in (64, 128)],
    "decode": lambda: [attend(decode.decode, 2, d, keys=900) for d in (64, 128)],
    "linear_any_groups": lambda: linear.linear(
        torch.randn(3, 1024).half(), grouped(make("int4", 64, 1024, g_idx=True))
    ),
    "linear": lambda: [
        linear.linear(torch.randn(3, 1024).half(), grouped(make("int4", 64, 1024, group=group)))
        for group in (32, 128)
    ],
    "norm": lambda: norm.rms_norm(torch.randn(4, 512).half(), torch.ones(512).half(), 1e-6),
}
BARRIER = re.compile(r"^ *(?:warp_)?barrier\(\);$", re.MULTILINE)


def barriers() -> list[tuple[str, int]]:
    """(file, how many before it in the file) of each barrier in a kernel."""
    files = sorted(path for path in KERNELS.iterdir() if path.name != "primitives.cuh")
    return [(path.name, i) for path in files for i, _ in enumerate(BARRIER.findall(path.read_text()))]


def calls_of(file: str) -> Callable[[], object]:
    return next(call for source, call in CALLS.items() if file.startswith(source))


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels' sources, which the wrappers load instead."""
    folder = tmp_path / "kernels"
    shutil.copytree(KERNELS, folder)
    (tmp_path / "emulator").symlink_to(build.EMULATOR)
    machine = build.machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "KERNELS", folder)
    monkeypatch.setattr(build, "machine", lambda: machine)

    def load(variant: Variant, device: torch.device) -> EmulatedKernel:
        return EmulatedKernel(variant, build.library(variant))

    monkeypatch.setattr(linear, "num_splits", lambda *args: 1)  # a block then takes several panels of columns
    for module in (decode, linear, norm, prefill):
        monkeypatch.setattr(module, "load", load)
    return folder


@pytest.mark.parametrize("source", CALLS)
def test_the_kernels_as_they_are_pass(source: str, kernels: Path) -> None:
    CALLS[source]()


@pytest.mark.parametrize(("file", "index"), barriers(), ids=str)
def test_a_kernel_without_one_of_its_barriers_is_caught(file: str, index: int, kernels: Path) -> None:
    path = kernels / file
    barrier = list(BARRIER.finditer(text := path.read_text()))[index]
    path.write_text(text[: barrier.start()] + text[barrier.end() :])
    with pytest.raises(EmulationError, match=r"race|uninitialised shared memory"):
        calls_of(file)()
