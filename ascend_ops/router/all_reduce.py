"""npu_mm_all_reduce_base: a row-parallel projection and the sum over the ranks in one operator (MC2).

When it pays is CANN's own rule for cutting the product: fewer rows than two of its smallest tiles leave
nothing to overlap, so decoding keeps matmul and all-reduce apart.
"""

from __future__ import annotations

from torch import Tensor

from .chips import Chip
from .invocation import Invocation

MIN_TILE = 128  # rows of the Cube's base tile
WORLDS = (1, 2, 4, 8)


def reasons(x: Tensor, weight: Tensor, world: int, chip: Chip) -> list[str]:
    """Against fusing ``x @ weight^T`` (weight (out, in)) with the ranks' sum; [] if it should be done."""
    out = chip.lacks("npu_mm_all_reduce_base")
    if world not in WORLDS:
        out.append(f"world: {world}, one of 1, 2, 4 and 8 cards")
    if str(x.dtype) not in ("torch.float16", "torch.bfloat16") or weight.dtype != x.dtype:
        out.append(f"dtype: {x.dtype} and {weight.dtype}, one of float16 and bfloat16")
    if x.shape[0] < 2 * MIN_TILE:
        out.append(f"rows: {x.shape[0]}, fewer than two tiles of {MIN_TILE}: nothing would overlap")
    return out


def invocation(x: Tensor, weight: Tensor, bias: Tensor | None, hcom: str) -> Invocation:
    """The sum over the ranks of ``x @ weight^T``; ``bias`` belongs to one rank, as the operator adds all."""
    kwargs = {"reduce_op": "sum", "comm_turn": 0} | ({} if bias is None else {"bias": bias})
    return Invocation("npu", "npu_mm_all_reduce_base", (x.contiguous(), weight.t(), hcom), kwargs, _result)


def _result(found: Tensor) -> Tensor:
    return found
