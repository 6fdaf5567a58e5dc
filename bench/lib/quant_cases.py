"""The cases of bench/quant.py: one linear layer in several weight formats, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import ops
from fastattn.quant import packed
from fastattn.spec import PackedWeight

from .args import ACTS, DTYPES
from .env import last_level_cache, on_gpu

T = TypeVar("T")
Rival = Callable[[Tensor], Tensor]
Int4 = tuple[Tensor, Tensor]  # codes in torch's order, and (groups, out, 2): scale and zero
# Private to torch.
INT4_PACK, INT4_PRODUCT = "_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"
FORMATS = {"int4-32": ("int4", 32), "int4-128": ("int4", 128), "int8-32": ("int8", 32)}


@dataclass(frozen=True)
class Layer:
    """A matrix (out, in) in one format, for x of one data type."""

    format: str
    out: int
    inn: int
    dtype: str

    def name(self, rows: int, act: str) -> str:
        """As it is written in records."""
        return f"{self.format} {self.dtype} act={act} {self.out}x{self.inn} rows={rows}"

    def flop(self, rows: int) -> int:
        """A multiplication and an addition for each row of x and number of W."""
        return 2 * rows * self.out * self.inn


@dataclass(frozen=True)
class Operands:
    """The same matrix for every rival, in as many copies as do not fit into caches."""

    layer: Layer
    weights: list[PackedWeight]
    dense: list[Tensor]
    int4: list[Int4]  # empty where torch has no kernel for the format

    @classmethod
    def of(cls, layer: Layer) -> Operands:
        """Random integers, scales and zeros. A zero is a bfloat16, as torch's int4 kernel needs it."""
        kind, group = FORMATS[layer.format]
        shape = (layer.out, layer.inn // group)
        scales = (torch.rand(shape) * 0.01 + 0.001).bfloat16().half()
        q = torch.randint(0, 16, (layer.out, layer.inn), dtype=torch.uint8)
        if kind == "int4":
            w = packed.pack_int4(q, scales, -8 * scales, group)
        else:
            w = packed.pack_int8(q.to(torch.int8) - 8, scales, None, group)
        dense = packed.dequantize(w, DTYPES[layer.dtype])
        int4 = None
        if kind == "int4" and layer.dtype == "bf16" and torch_has_int4() and not on_gpu():
            codes = getattr(torch.ops.aten, INT4_PACK)(q.int(), 1)
            zeros = torch.zeros_like(scales)
            int4 = codes, torch.stack((scales, zeros), 2).transpose(0, 1).contiguous().bfloat16()
        return cls(
            layer,
            copies(w, lambda t: t._replace(tensors={n: x.clone() for n, x in t.tensors.items()}), nbytes(w)),
            copies(dense, Tensor.clone, dense.nbytes),
            [] if int4 is None else copies(int4, lambda t: (t[0].clone(), t[1].clone()), nbytes(w)),
        )

    def rivals(self, act: str) -> dict[str, Rival]:
        """fastattn and torch's kernels, each on the next copy of the matrix at every call."""
        weights, dense, int4 = cycle(self.weights), cycle(self.dense), cycle(self.int4)
        named: dict[str, Rival] = {
            "fastattn": lambda x: ops.linear(x, next(weights), act=ACTS[act]),
            f"torch {self.layer.dtype}": lambda x: F.linear(x, next(dense)),
        }
        if self.int4:
            named["torch int4"] = lambda x: torch_int4(x, int4, FORMATS[self.layer.format][1])
        return named


def torch_has_int4() -> bool:
    """Whether this torch has the private int4 kernel for the CPU."""
    return all(hasattr(torch.ops.aten, name) for name in (INT4_PACK, INT4_PRODUCT))


def torch_int4(x: Tensor, weights: Iterator[Int4], group: int) -> Tensor:
    """torch's kernel behind int4 weight-only quantization."""
    codes, scales_and_zeros = next(weights)
    out = getattr(torch.ops.aten, INT4_PRODUCT)(x, codes, group, scales_and_zeros)
    assert isinstance(out, Tensor)
    return out


def nbytes(w: PackedWeight) -> int:
    """Of everything that a product must read."""
    return sum(t.nbytes for t in w.tensors.values())


def copies(original: T, clone: Callable[[T], T], size: int) -> list[T]:
    """So many that together they are 8 last-level caches."""
    return [original, *(clone(original) for _ in range(-(-8 * last_level_cache() // size) - 1))]
