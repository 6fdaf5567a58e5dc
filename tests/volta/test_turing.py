"""Turing (sm_75): the same kernels on Volta's tensor-core instruction, with less shared memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cuda_volta import catalog, decode, linear, prefill, runtime
from cuda_volta.__main__ import main
from cuda_volta.attention import widest_head_dim
from cuda_volta.binary import SHARED_BYTES
from cuda_volta.sass import listing

from .sass_code import needs_cuda_12

TURING = SHARED_BYTES["sm_75"]
LARGE = [v for v in catalog.variants() if v.shared_bytes > TURING]


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that says it is a T4, and runs nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(runtime, "against", lambda device: [])
    return torch.device("cuda", 0)


def test_what_it_has_no_room_for_is_neither_built_nor_promised() -> None:
    assert {(v.op, v.head_dim) for v in LARGE} == {("prefill", 192), ("prefill", 256)}
    assert set(catalog.variants("sm_75")) == set(catalog.variants()) - set(LARGE)
    assert widest_head_dim(TURING) == 160
    assert widest_head_dim(SHARED_BYTES["sm_70"]) == max(prefill.HEAD_DIMS)
    for d in prefill.HEAD_DIMS:
        fits = all(prefill.PREFILL[d, f].shared_bytes <= TURING for f in prefill.FEATURES)
        assert fits == (d <= widest_head_dim(TURING)), d


def test_a_kernel_without_room_is_refused_by_name(turing: torch.device) -> None:
    with pytest.raises(ValueError, match=rf"{LARGE[0].name} needs \d+ KB of shared memory, sm_75 has 64"):
        runtime.load(LARGE[0], turing)


@pytest.mark.toolchain
@needs_cuda_12
def test_everything_that_fits_compiles_without_spills(tmp_path: Path) -> None:
    """Every kernel that the backend can launch there; where a wheel is built, these are what it holds."""
    assert main(["build", "--arch", "sm_75", "--out", str(tmp_path), "--jobs", "2"]) == 0
    index = {entry["cubin"]: entry for entry in json.loads((tmp_path / "index.json").read_text())}
    variants = catalog.variants("sm_75")
    assert set(index) == {f"{v.name}.cubin" for v in variants}
    assert not list(tmp_path.glob("*.ptx")), "newer GPUs run sm_70's"
    for v in variants:
        entry = index[f"{v.name}.cubin"]
        assert (entry["spill_bytes"], entry["stack_bytes"]) == (0, 0), v.name
        assert entry["shared_bytes"] <= TURING, v.name
        assert v.threads <= 1024 * 64 // entry["registers"], v.name  # 64 K registers
        assert v.threads * v.min_blocks <= 1024, v.name
    for v in (*prefill.VARIANTS[::5], *decode.VARIANTS[:2], linear.LINEAR[4], linear.ANY_GROUPS[8]):
        if v in variants:
            _check_products(tmp_path / f"{v.name}.cubin")


def _check_products(cubin: Path) -> None:
    """They are Volta's instruction, and not sm_75's own."""
    (function,) = listing.read(cubin).values()
    products = {i.opcode for i in function.instructions if "HMMA" in i.opcode}
    assert products
    assert all(name.startswith("HMMA.884.F32") for name in products), products
