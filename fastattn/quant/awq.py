"""AWQ's gemm layout: 4-bit integers packed along out, the eight of a word interleaved.

A matrix (out, in) is ``qweight`` int32 (in, out / 8), ``qzeros`` int32 (groups, out / 8) and ``scales``
float16 (groups, out); ``w = scales * (q - zero)``. Bits 4 i to 4 i + 3 of a word hold its column
``INTERLEAVE[i]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..spec import Cut
from . import words
from .cuts import spans_of, take
from .grouped import Grouped, Tensors, num_groups, trivial_g_idx

BITS = 4
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq:
    """A `grouped.Format`: how the matrices of one checkpoint are stored."""

    group_size: int  # -1: one group a row
    name: ClassVar[str] = "awq"
    tensors: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")
    optional: ClassVar[frozenset[str]] = frozenset()

    def shapes(self, out: int, inn: int) -> Mapping[str, tuple[int, ...]]:
        if out % len(INTERLEAVE):
            raise ValueError(f"{out} rows, AWQ packs multiples of {len(INTERLEAVE)}")
        groups = num_groups(inn, self.group_size)
        return {"qweight": (inn, out // 8), "qzeros": (groups, out // 8), "scales": (groups, out)}

    def dtypes(self, tensor: str) -> tuple[torch.dtype, ...]:
        if tensor == "scales":
            return torch.float16, torch.bfloat16, torch.float32
        return (torch.int32,)

    def g_idx(self, tensors: Tensors, inn: int) -> Tensor | None:
        return None

    def read(self, tensors: Tensors, out: Cut, inn: Cut) -> Grouped:
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        places = _places(out)
        return Grouped(
            BITS,
            self.group_size if self.group_size > 0 else inn.size,
            words.unpack_cut(take(qweight, inn, 0), BITS, places, axis=1).t(),
            take(scales, out, 1).t(),
            words.unpack_cut(qzeros, BITS, places, axis=1).t(),
            take(trivial_g_idx(inn.size, self.group_size), inn),
        )


def pack(values: Tensor) -> Tensor:
    """Packs integers 0..15 (n, out) along out; int32 (n, out / 8)."""
    if values.shape[1] % len(INTERLEAVE):
        raise ValueError(f"values: {values.shape[1]} columns, AWQ packs multiples of {len(INTERLEAVE)}")
    mixed = values.unflatten(1, (-1, len(INTERLEAVE)))[:, :, list(INTERLEAVE)].flatten(1)
    return words.pack(mixed, BITS, axis=1)


def _places(out: Cut) -> Cut:
    """Where the columns that ``out`` selects lie in the stream of stored values."""
    if out.order is None:
        order = torch.cat([torch.arange(lo, hi) for lo, hi in spans_of(out)])
    else:
        order = out.order.long()
    nibble = torch.tensor(INTERLEAVE).argsort()  # of each column of a word
    return Cut(out.size, order=order // 8 * 8 + nibble[order % 8])
