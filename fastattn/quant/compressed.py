"""The compressed-tensors format ``pack-quantized``.

A matrix (out, in) is ``weight_packed`` int32 (out, ceil(in * bits / 32)), packed along in; ``weight_scale``
(out, groups); ``weight_shape`` with the values out, in; where asymmetric ``weight_zero_point`` int32
(ceil(out * bits / 32), groups), packed along out; with ``actorder: group`` ``weight_g_idx`` int32 (in,).
Integers are signed and stored plus 2^(bits - 1); ``w = weight_scale * (q - weight_zero_point)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..spec import Cut
from . import words
from .cuts import take
from .grouped import Grouped, Tensors, check_g_idx, num_groups, trivial_g_idx

BITS = (2, 4, 8)  # at 3 bits this format would leave 2 bits of each word unused


@dataclass(frozen=True)
class Compressed:
    """A `grouped.Format`: how the matrices of one checkpoint are stored."""

    bits: int
    group_size: int  # -1: one group a row
    act_order: bool
    symmetric: bool
    name: ClassVar[str] = "compressed-tensors"
    tensors: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx",
    )  # fmt: skip

    @property
    def optional(self) -> frozenset[str]:
        unused = {"weight_g_idx": self.act_order, "weight_zero_point": not self.symmetric}
        return frozenset(name for name, used in unused.items() if not used)

    def shapes(self, out: int, inn: int) -> Mapping[str, tuple[int, ...]]:
        groups = num_groups(inn, self.group_size)
        return {
            "weight_packed": (out, words.num_words(inn, self.bits)),
            "weight_scale": (out, groups),
            "weight_shape": (2,),
            "weight_zero_point": (words.num_words(out, self.bits), groups),
            "weight_g_idx": (inn,),
        }

    def dtypes(self, tensor: str) -> tuple[torch.dtype, ...]:
        if tensor == "weight_scale":
            return torch.float16, torch.bfloat16, torch.float32
        if tensor == "weight_shape":
            return torch.int64, torch.int32
        return (torch.int32,)

    def g_idx(self, tensors: Tensors, inn: int) -> Tensor | None:
        stored = tensors.get("weight_g_idx")
        if stored is None:
            return None
        return check_g_idx(stored, self.group_size, self.act_order, "weight_g_idx")

    def read(self, tensors: Tensors, out: Cut, inn: Cut) -> Grouped:
        shape = tensors["weight_shape"]
        if shape.tolist() != [out.size, inn.size]:
            raise ValueError(f"weight_shape: {shape.tolist()}, expected {[out.size, inn.size]}")
        zero, g_idx = tensors.get("weight_zero_point"), self.g_idx(tensors, inn.size)
        return Grouped(
            self.bits,
            self.group_size if self.group_size > 0 else inn.size,
            words.unpack_cut(take(tensors["weight_packed"], out, 0), self.bits, inn, axis=1),
            take(tensors["weight_scale"], out, 0),
            None if zero is None else words.unpack_cut(zero, self.bits, out, axis=0),
            take(trivial_g_idx(inn.size, self.group_size) if g_idx is None else g_idx, inn),
        )
