"""The tensors of GPTQ checkpoints, packed and unpacked exactly.

A matrix (out, in) is four tensors: ``qweight`` int32 (ceil(in * bits / 32), out), packed along in;
``qzeros`` int32 (groups, ceil(out * bits / 32)), packed along out; ``scales`` float16 (groups, out); and
``g_idx`` int32 (in,), the group of each column. ``w = scales * (q - zero)``. Without act-order ``g_idx[c]``
is ``c // group_size``; with it (``desc_act``) groups were filled in the order of falling importance.

How a zero is stored (``zeros=``):

``v2``     as it is: ``checkpoint_format: gptq_v2``.
``v1``     minus 1, modulo 2^bits, each for itself: ``checkpoint_format: gptq``.
``words``  minus 1 by one subtraction a 32-bit word, whose borrows run on into the next value: the v1 of
           gptqmodel, which moreover subtracts at other bits than `words.pack` uses in two of three words
           at 3 bits. Where no zero is 0 and bits are not 3, the same as ``v1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..spec import Cut
from . import words
from .cuts import take
from .grouped import Grouped, Tensors, check_g_idx, num_groups, trivial_g_idx

ZEROS = ("v2", "v1", "words")
# What gptqmodel (convert_gptq_v1_to_v2_format) adds to a word of zeros, by the word's place.
_WORD_OFFSETS = {
    2: (0x55555555,),
    3: (0x24924924, 0x92492492, 0x49249249),
    4: (0x11111111,),
    8: (0x01010101,),
}


class GptqTensors(NamedTuple):
    """One matrix as it lies on disk."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None  # None: files without act-order may leave it out


@dataclass(frozen=True)
class Gptq:
    """A `grouped.Format`: how the matrices of one checkpoint are stored."""

    bits: int
    group_size: int  # -1: one group a row
    act_order: bool
    zeros: str
    name: ClassVar[str] = "gptq"
    tensors: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def optional(self) -> frozenset[str]:
        return frozenset() if self.act_order else frozenset({"g_idx"})

    def shapes(self, out: int, inn: int) -> Mapping[str, tuple[int, ...]]:
        return shapes(out, inn, self.bits, self.group_size)

    def dtypes(self, tensor: str) -> tuple[torch.dtype, ...]:
        if tensor == "scales":
            return torch.float16, torch.bfloat16, torch.float32
        return (torch.int32,)

    def g_idx(self, tensors: Tensors, inn: int) -> Tensor | None:
        stored = tensors.get("g_idx")
        return None if stored is None else check_g_idx(stored, self.group_size, self.act_order)

    def read(self, tensors: Tensors, out: Cut, inn: Cut) -> Grouped:
        qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        g_idx = self.g_idx(tensors, inn.size)
        return Grouped(
            self.bits,
            self.group_size if self.group_size > 0 else inn.size,
            unpack_q(qweight, self.bits, out, inn),
            take(scales, out, 1).t(),
            unpack_zeros(qzeros, self.bits, out, self.zeros),
            take(trivial_g_idx(inn.size, self.group_size) if g_idx is None else g_idx, inn),
        )


def shapes(out: int, inn: int, bits: int, group_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a matrix (out, in), by name."""
    groups = num_groups(inn, group_size)
    return {
        "qweight": (words.num_words(inn, bits), out),
        "qzeros": (groups, words.num_words(out, bits)),
        "scales": (groups, out),
        "g_idx": (inn,),
    }


def pack(q: Tensor, scales: Tensor, zero: Tensor, g_idx: Tensor, bits: int, zeros: str = "v1") -> GptqTensors:
    """Packs integers ``q`` (out, in) and ``zero`` (out, groups), both 0..2^bits - 1.

    ``scales`` (out, groups) are stored as float16, which has to be exact; ``g_idx`` (in,) holds the group of
    each column; ``zeros`` is "v1" or "v2". Raises ValueError for values that do not fit.
    """
    out, inn = q.shape
    groups = scales.shape[1]
    for name, t, shape in (
        ("scales", scales, (out, groups)),
        ("zero", zero, (out, groups)),
        ("g_idx", g_idx, (inn,)),
    ):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(t.shape)}, expected {shape}")
    if inn and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(f"g_idx: {int(g_idx.min())}..{int(g_idx.max())}, expected 0..{groups - 1}")
    half = scales.to(torch.float16)
    if not torch.equal(half.to(scales.dtype), scales):
        raise ValueError("scales: not exact in float16; round them before q is computed")
    if zeros not in ("v1", "v2"):
        raise ValueError(f"zeros: {zeros!r}, expected 'v1' or 'v2'")
    words.check_bits(bits)
    words.check_range(zero, bits, "zero")
    stored = zero.int() if zeros == "v2" else (zero.int() - 1) & ((1 << bits) - 1)
    return GptqTensors(
        words.pack(q, bits, axis=1).t().contiguous(),
        words.pack(stored, bits, axis=0).t().contiguous(),
        half.t().contiguous(),
        g_idx.int().contiguous(),
    )


def unpack_q(qweight: Tensor, bits: int, out: Cut, inn: Cut) -> Tensor:
    """The integers that the cuts select, uint8 (out, in)."""
    return words.unpack_cut(take(qweight, out, 1), bits, inn, axis=0).t()


def unpack_zeros(qzeros: Tensor, bits: int, out: Cut, zeros: str) -> Tensor:
    """The zeros of the rows that ``out`` selects, uint8 (out, groups)."""
    if zeros not in ZEROS:
        raise ValueError(f"zeros: {zeros!r}, expected one of {', '.join(ZEROS)}")
    if zeros == "words":
        offsets = torch.tensor(_WORD_OFFSETS[bits], dtype=torch.int64)
        added = qzeros.long() + offsets[torch.arange(qzeros.shape[1]) % len(offsets)]
        qzeros = ((added + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    values = words.unpack_cut(qzeros, bits, out, axis=1).t()
    return (values + 1) & ((1 << bits) - 1) if zeros == "v1" else values
