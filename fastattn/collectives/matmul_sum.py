"""The policy `matmul_sum`: on Ascend, the row-parallel product and its all-reduce as one operator of CANN's.

npu_mm_all_reduce_base overlaps the two by itself (MC2). It is used for the sums that are large enough for
that, by CANN's own rule (`ascend_ops.router.all_reduce`), with `tiled` around it tile by tile. All other sums
are the policy `exact`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ascend_ops import router
from ascend_ops.router import all_reduce

from ..spec import Point, TPGroup
from .exact import Exact
from .exchange import Lane, Pending, device_of, traffic
from .steps import Steps
from .sums import Partial


@dataclass(frozen=True)
class MatmulSum(Exact):
    """As `Exact`, with the products of large dense partial results inside of the all-reduce."""

    name: ClassVar[str] = "matmul_sum"

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        if g.world > 1 and not on_npu(g):
            return ["the group's backend is not HCCL, of which the operator is a part"]
        return super().reasons(p, rows, hidden, dtype, g)

    def steps(self, lane: Lane, x: Partial) -> Steps[Tensor]:
        if not fuses(x, lane.group):
            return (yield from super().steps(lane, x))
        assert x.weight is not None
        assert x.gemm_input is not None
        product = x.gemm_input()
        weight = x.weight.tensors["weight"]
        traffic.add("mm_all_reduce", product)
        hcom = all_reduce.hcom(lane.group.pg, lane.group.rank)
        total: Tensor = all_reduce.invocation(product, weight, None, hcom)()
        yield Pending(lane.group, lane.where)  # in order on the device's stream: nothing to wait for here
        return total


def fuses(x: Partial, g: TPGroup) -> bool:
    """The on/off rule."""
    w = x.weight
    if w is None or w.format != "dense" or w.x_perm is not None or not on_npu(g):
        return False
    return not all_reduce.reasons(x.rows, x.dtype, w.tensors["weight"].dtype, g.world, router.current())


def on_npu(g: TPGroup) -> bool:
    """Whether the group exchanges through HCCL."""
    return device_of(g).type == "npu"
