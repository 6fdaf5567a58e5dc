"""How a model's matrices are to be quantized: the settings of a GPTQ checkpoint and of the way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..spec import Cut
from . import column_order, gptq
from .column_order import ColumnOrder
from .gptq_solver import Quantized, round_to_nearest, solve
from .grid import Grid
from .grouped import trivial_g_idx
from .words import BITS

GROUP_SIZES = (32, 64, 128, -1)
ACT_ORDERS = ("none", "group", "global", "head")
METHODS = ("gptq", "rtn")
_STORED_ZEROS = {"gptq": "v1", "gptq_v2": "v2"}  # quant.gptq's names


class Heads(NamedTuple):
    """Of the attention whose output a matrix takes as its input."""

    query: int
    kv: int


@dataclass(frozen=True)
class Recipe:
    """Settings of `models.quantize.quantize`; raises ValueError for those that GPTQ files cannot have.

    Args:
        bits: of a weight: 2, 3, 4 or 8.
        group_size: columns that share a scale: 32, 64, 128, or -1 for all; the last group may be shorter.
        sym: the zero point is the middle of the grid; otherwise each group has its own.
        act_order: in which order columns are quantized, and put into groups (`column_order`). "group": by
            their activations, in groups of neighbours, which costs nothing at run time. "global": groups
            too follow the activations, ``desc_act`` in the file. "head": as global, but inside heads for
            attention output projections, the same for all query heads of a KV head, so that tensor
            parallelism can fold the permutation into v_proj. "none": as columns lie.
        damp: added to the Hessian's diagonal, as a share of its mean.
        search: scales minimize the weighted error; otherwise they span the largest weight of their group.
        format: "gptq" stores zero points minus 1, "gptq_v2" as they are.
        method: "gptq", or "rtn": round to nearest, which looks at no text.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    act_order: str = "group"
    damp: float = 0.01
    search: bool = True
    format: str = "gptq"
    method: str = "gptq"

    def __post_init__(self) -> None:
        for name, accepted in (
            ("bits", BITS), ("group_size", GROUP_SIZES), ("act_order", ACT_ORDERS),
            ("format", tuple(_STORED_ZEROS)), ("method", METHODS),
        ):  # fmt: skip
            found = getattr(self, name)
            if found not in accepted:
                raise ValueError(f"{name}: {found!r}, expected one of {', '.join(map(repr, accepted))}")
        if not 0 < self.damp < 1:
            raise ValueError(f"damp: {self.damp}, expected a share between 0 and 1")
        if self.method == "rtn" and self.act_order != "none":
            raise ValueError(f"act_order: {self.act_order!r}, but method 'rtn' knows no activations")

    def quantize(self, weight: Tensor, hessian: Tensor | None, heads: Heads | None = None) -> Quantized:
        """Quantizes ``weight`` (out, in), float32, for inputs of moments ``hessian`` (None with "rtn").

        ``heads``: of an attention output projection.
        """
        grid = Grid(self.bits, self.sym, self.search)
        if self.method == "rtn" or hessian is None:
            return round_to_nearest(weight, grid, trivial_g_idx(weight.shape[1], self.group_size))
        order = self._order(hessian.diagonal(), heads)
        return solve(weight, hessian, grid, order, damp=self.damp)

    def _order(self, energy: Tensor, heads: Heads | None) -> ColumnOrder:
        if self.act_order == "none":
            return column_order.by_position(len(energy), self.group_size)
        if self.act_order == "group":
            return column_order.by_group(energy, self.group_size)
        if self.act_order == "head" and heads is not None:
            return column_order.within_heads(energy, self.group_size, *heads)
        return column_order.by_activation(energy, self.group_size)

    def pack(self, q: Quantized) -> gptq.GptqTensors:
        """The tensors of a matrix as they go to disk."""
        return gptq.pack(q.codes, q.scales, q.zeros, q.g_idx, self.bits, _STORED_ZEROS[self.format])

    def unpack(self, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Quantized:
        """The inverse of `pack`."""
        out, inn = Cut(scales.shape[1]), Cut(len(g_idx))
        codes = gptq.unpack_q(qweight, self.bits, out, inn)
        zeros = gptq.unpack_zeros(qzeros, self.bits, out, _STORED_ZEROS[self.format])
        return Quantized(codes.contiguous(), scales.T.contiguous(), zeros.contiguous(), g_idx)

    def quantization_config(self) -> dict[str, Any]:
        """What config.json says about the weights, in the words of published GPTQ checkpoints."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.act_order in ("global", "head"),
            "static_groups": False,
            "sym": self.sym,
            "true_sequential": True,
            "damp_percent": self.damp,
            "lm_head": False,
            "checkpoint_format": self.format,
            "pack_dtype": "int32",
        }
