"""The policy `fused_norm` over symmetric memory: ranks as threads on a CPU, or processes on one GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

from fastattn import reference_ops, use_backend
from fastattn.collectives import symmetric
from fastattn.collectives.sums import row_spans
from fastattn.spec import Epilogue, RmsNormArgs, Stream, TPGroup
from tests.ops.runners import FLOATS, assert_accurate, random

ROOT = Path(__file__).parents[2]


@dataclass
class Norm:
    weight: Tensor
    eps: float

    is_rms_norm: ClassVar[bool] = True

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        raise AssertionError("the kernel normalises")


class Shared(NamedTuple):
    """Memory that the threads of one process share."""

    mine: Tensor
    addresses: Tensor
    meeting: threading.Barrier
    multicast: int = 0

    def barrier(self, channel: int) -> None:
        self.meeting.wait(60)


@pytest.mark.toolchain
@pytest.mark.emulate("triton")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("world", "rows"), [(2, 5), (3, 2), (3, 7)], ids=str)
def test_ranks_over_shared_memory(
    world: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sync points, one after the other: the second takes the scattered residual of the first."""
    from fastattn.dispatch import unavailable
    from fastattn.triton_ops import reduce_norm as kernels

    assert not unavailable("triton")
    # The interpreter has one state for the process; between the barriers ranks touch rows of their own.
    one_at_a_time, launch = threading.Lock(), kernels.reduce_norm

    def locked(*args: object) -> None:
        with one_at_a_time:
            launch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "reduce_norm", locked)
    hidden = 64
    points = [[random(rows, hidden, seed=10 * p + r, dtype=dtype) for r in range(world)] for p in range(2)]
    norm = Norm(random(hidden, seed=50, dtype=dtype), 1e-5)
    start = random(rows, hidden, seed=51, dtype=dtype)
    memories = [torch.zeros(1 << 12, dtype=torch.uint8) for _ in range(world)]
    addresses, meeting = torch.tensor([m.data_ptr() for m in memories]), threading.Barrier(world)
    before = [t.clone() for t in (start, *points[0], *points[1])]

    def rank(r: int) -> list[Stream]:
        g = TPGroup(None, r, world, 60.0, (1.0,) * world)
        m, (lo, hi) = Shared(memories[r], addresses, meeting), row_spans(rows, world)[r]
        first = symmetric.sum_and_normalise(m, points[0][r], start[lo:hi], norm, g)
        return [first, symmetric.sum_and_normalise(m, points[1][r], first.residual, norm, g)]

    with ThreadPoolExecutor(world) as threads:
        streams = list(threads.map(rank, range(world)))
    residual, exact = start, start.double()
    for p in range(2):
        total = sum(x.float() for x in points[p])
        exact = exact + total.double()
        residual = reference_ops.rms_norm(RmsNormArgs(total, norm.weight, 1e-5, residual))[1].to(dtype)
        assert torch.equal(torch.cat([s[p].residual for s in streams]), residual)
        wanted = reference_ops.rms_norm(RmsNormArgs(residual, norm.weight, 1e-5))[0]
        for s in streams:
            hidden_rows = s[p].hidden
            assert hidden_rows is not None
            assert torch.equal(hidden_rows, streams[0][p].hidden)
            assert_accurate(hidden_rows, wanted.to(dtype), wanted)
    assert [s[1].rows for s in streams] == row_spans(rows, world)
    assert all(map(torch.equal, before, (start, *points[0], *points[1])))  # nothing given is overwritten


def test_what_the_kernel_cannot_do_travels() -> None:
    cuda, norm = torch.device("cuda"), Norm(torch.ones(64), 1e-5)

    def against(hidden: int, dtype: torch.dtype, e: Epilogue, device: torch.device = cuda) -> str:
        return "; ".join(symmetric.reasons_against(symmetric.Call(4, hidden, dtype, device), e))

    plain = Epilogue(None, norm)
    assert against(64, torch.float16, plain) == ""
    assert "tensors are on 'cpu'" in against(64, torch.float16, plain, torch.device("cpu"))
    assert "dtype torch.float64" in against(64, torch.float64, plain)
    assert "hidden 36: rows are no multiple of 16 bytes" in against(36, torch.float16, plain)
    for other in (
        Epilogue(torch.zeros(64), norm),
        Epilogue(None, None),
        Epilogue(None, lambda x, residual: (x, x)),
        Epilogue(None, torch.nn.LayerNorm(64)),  # type: ignore[arg-type]
    ):
        assert "adds no bias, and RMSNorm" in against(64, torch.float16, other)
    with use_backend("sdpa"):
        assert "'sdpa' was asked for" in against(64, torch.float16, plain)
    with use_backend("triton,sdpa"):
        assert against(64, torch.float16, plain) == ""


def test_memory_is_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank enters the rendezvous, where it would wait, unless all have memory."""
    call, g = symmetric.Call(4, 64, torch.float16, torch.device("cpu")), TPGroup(None, 0, 2, 60.0, (1.0, 1.0))
    monkeypatch.setattr(symmetric, "_memories", {})
    monkeypatch.setattr(symmetric, "room", lambda *_: torch.zeros(1 << 20, dtype=torch.uint8))
    monkeypatch.setattr(symmetric, "all_gather", lambda g, flag, where: [flag, torch.zeros_like(flag)])
    monkeypatch.setattr(symmetric, "DeviceMemory", None)
    assert symmetric.memory(call, g) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("world", [2, 4])
def test_several_ranks_on_one_gpu(world: int) -> None:
    """torch lets ranks share a device when this variable says so; messages would go through gloo."""
    environ = os.environ | {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    program = str(Path(__file__).with_name("symmetric_ranks.py"))
    done = subprocess.run(
        [*command, program], env=environ, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("over symmetric memory") == world
