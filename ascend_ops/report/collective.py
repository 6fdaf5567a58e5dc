"""The sum over the ranks on an NPU: HCCL's all-reduce, and npu_mm_all_reduce_base, against float64.

Under torchrun over its ranks; alone, in a group of one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from ..router import Invocation, all_reduce
from .measure import Row, Setting, measure, row, same

ROWS = 512


def ranks() -> tuple[int, int]:
    """(rank, world) of the launcher's environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process's device on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rows(setting: Setting) -> Iterator[Row]:
    """A row-parallel product in two steps and in one; every rank calls it."""
    rank, world = ranks()
    backend = "gloo" if setting.device.type == "cpu" else "hccl"
    if world == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    try:
        yield from _rows(setting, rank, world)
    finally:
        dist.destroy_process_group()


def _rows(setting: Setting, rank: int, world: int) -> Iterator[Row]:
    inn, out = (64, 48) if setting.quick else (4096, 4096)
    pieces = [_piece(r, inn, out) for r in range(world)]
    exact = sum(x.double() @ w.double().T for x, w in pieces)
    assert isinstance(exact, Tensor)
    x, weight = (t.to(setting.device) for t in pieces[rank])

    def apart() -> Tensor:
        total = x @ weight.T
        dist.all_reduce(total)
        return total

    ways = f"{world} ranks, {dist.get_backend()}"
    text, right = measure(apart, exact, setting)
    yield Row(f"matmul, all_reduce, {ways}", "torch's and HCCL's", text, "", right)

    def vendor() -> Invocation | str:
        against = all_reduce.reasons(ROWS, x.dtype, weight.dtype, world, setting.chip)
        if against:
            return "; ".join(against)
        assert dist.group.WORLD is not None
        return all_reduce.invocation(x, weight, None, all_reduce.hcom(dist.group.WORLD, rank))

    yield row(setting, f"matmul and sum in one, {ways}", exact, vendor, same, None)


def _piece(rank: int, inn: int, out: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rank)
    x, w = (torch.randn(n, inn, generator=g) for n in (ROWS, out))
    return (x / inn**0.5).half(), w.half()
