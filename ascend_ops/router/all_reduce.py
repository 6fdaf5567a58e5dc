"""npu_mm_all_reduce_base: a row-parallel projection and the sum over the ranks in one operator (MC2).

When it pays is CANN's own rule for cutting the product: fewer rows than two of its smallest tiles leave
nothing to overlap, so decoding keeps matmul and all-reduce apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chips import Chip
from .invocation import Invocation

MIN_TILE = 128  # rows of the Cube's base tile
WORLDS = (1, 2, 4, 8)


def reasons(rows: int, dtype: torch.dtype, weight_dtype: torch.dtype, world: int, chip: Chip) -> list[str]:
    """Against fusing ``x @ weight^T`` for x of so many rows with the ranks' sum; [] if it should be done.

    Every rank must decide alike, so what differs between shards has no say.
    """
    out = chip.lacks("npu_mm_all_reduce_base")
    if world not in WORLDS:
        out.append(f"world: {world}, one of 1, 2, 4 and 8 cards")
    if dtype not in (torch.float16, torch.bfloat16) or weight_dtype != dtype:
        out.append(f"dtype: {dtype} and {weight_dtype}, one of float16 and bfloat16")
    if rows < 2 * MIN_TILE:
        out.append(f"rows: {rows}, fewer than two tiles of {MIN_TILE}: nothing would overlap")
    return out


def hcom(group: Any, rank: int) -> str:
    """The name by which CANN's operators know a process group; it exists only where its backend is HCCL."""
    name: str = group._get_backend(torch.device("npu")).get_hccl_comm_name(rank)  # noqa: SLF001
    return name


def invocation(x: Tensor, weight: Tensor, bias: Tensor | None, hcom: str) -> Invocation:
    """The sum over the ranks of ``x @ weight^T``, weight (out, in); every rank's ``bias`` is added."""
    kwargs = {"reduce_op": "sum", "comm_turn": 0} | ({} if bias is None else {"bias": bias})
    args = (x.contiguous(), weight.t(), hcom)
    return Invocation("npu", "npu_mm_all_reduce_base", args, kwargs, lambda found: found)
