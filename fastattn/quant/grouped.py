"""From groups of integers, as formats on disk describe a matrix, to the layouts of `packed`.

``w[o, c] = scales[o, g] * (q[o, c] - zero[o, g])`` with ``g = groups[c]``. Columns of one group need not be
neighbours (act-order). Then they are brought together here, once, so that kernels read the scales of each
group once: TP-Aware Dequantization (2402.04925), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec import Cut, PackedWeight
from . import packed

_HALF_MAX = 65504.0
_LANE = 8  # columns


Tensors = Mapping[str, Tensor]  # of one matrix, by their names; views of a file, of which only parts are read


class Grouped(NamedTuple):
    """A piece of a matrix (out, in) with the scales of all its groups."""

    bits: int
    group_size: int  # of every group but the last, which may be short
    q: Tensor  # uint8 (out, in)
    scales: Tensor  # floats (out, groups)
    zero: Tensor | None  # integers (out, groups); None: 2^(bits - 1)
    groups: Tensor  # integers (in,)


class Format(Protocol):
    """How one kind of checkpoint stores a matrix: its tensors, and what they mean."""

    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that a matrix may have."""
        ...

    @property
    def optional(self) -> frozenset[str]:
        """Tensors that may be absent."""
        ...

    def shapes(self, out: int, inn: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor; ValueError when the format has no such matrix."""
        ...

    def dtypes(self, tensor: str) -> tuple[torch.dtype, ...]:
        """What a tensor may be made of."""
        ...

    def g_idx(self, tensors: Tensors, inn: int) -> Tensor | None:
        """The group of each column (in,), checked; None where groups are neighbouring columns in order."""
        ...

    def read(self, tensors: Tensors, out: Cut, inn: Cut) -> Grouped:
        """The piece that the cuts select, of the words that hold it; ValueError for contradictions."""
        ...


def num_groups(inn: int, group_size: int) -> int:
    """Groups of a row; the last one may be short. ``group_size`` -1: all columns are one."""
    return 1 if group_size == -1 else -(-inn // group_size)


def trivial_g_idx(inn: int, group_size: int) -> Tensor:
    """The group of each column without act-order, int32 (in,)."""
    return torch.arange(inn, dtype=torch.int32) // (max(inn, 1) if group_size == -1 else group_size)


def check_g_idx(g_idx: Tensor, group_size: int, act_order: bool, name: str = "g_idx") -> Tensor | None:
    """``g_idx``, or None where it is trivial; ValueError unless each group has ``group_size`` columns.

    ``act_order``: whether the checkpoint may have groups of scattered columns.
    """
    natural = trivial_g_idx(g_idx.numel(), group_size).to(g_idx.dtype)
    if torch.equal(g_idx, natural):
        return None
    if not act_order:
        raise ValueError(f"{name}: groups are not in the order of columns, though there is no act-order")
    groups = num_groups(g_idx.numel(), group_size)
    if not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise ValueError(
            f"{name}: names groups {int(g_idx.min())}..{int(g_idx.max())}, expected 0..{groups - 1}"
        )
    found, expected = (torch.bincount(t.long(), minlength=groups) for t in (g_idx, natural))
    wrong = (found != expected).nonzero().flatten()
    if wrong.numel():
        g = int(wrong[0])
        raise ValueError(f"{name}: puts {int(found[g])} columns into group {g}, expected {int(expected[g])}")
    return g_idx


def sorted_columns(g_idx: Tensor) -> Tensor:
    """``P = argsort(g_idx)``, int64 (in,), neighbours in a group in their own order (Algorithm 1)."""
    return torch.argsort(g_idx, stable=True)


def order_of_lanes(groups: Tensor) -> Tensor:
    """An order, int64 (in,), in which few lanes of a kernel meet columns of two groups.

    Where a piece has only some columns of each group, sorting leaves a group's end in the middle of a
    chunk. Here whole chunks of one group come first, then lanes of one group, then what is left of all
    groups. A lane is what one 32-bit sum covers: bytes 4 j .. 4 j + 3 of a chunk of int4 codes, columns
    4 j .. 4 j + 3 and 16 + 4 j .. 16 + 4 j + 3 (`packed`).
    """
    by_group = sorted_columns(groups)
    _, inverse, counts = torch.unique(groups[by_group], return_inverse=True, return_counts=True)
    place = torch.arange(groups.numel()) - (counts.cumsum(0) - counts)[inverse]
    whole = counts[inverse]
    kind = (place >= whole // packed.CHUNK * packed.CHUNK).int() + (place >= whole // _LANE * _LANE).int()
    ordered = by_group[torch.argsort(kind, stable=True)]
    chunks = ordered[: groups.numel() // packed.CHUNK * packed.CHUNK].view(-1, 4, 2, _LANE // 2)
    return torch.cat((chunks.transpose(1, 2).flatten(), ordered[chunks.numel() :]))


def pack(g: Grouped) -> PackedWeight:
    """The piece as int4 or int8, its groups contiguous.

    Columns that are not in the order of their groups are sorted, and ``x_perm`` tells how. A piece that has
    only some columns of each group names them column by column (``g_idx``), in `order_of_lanes`, and keeps
    the scales of the groups it has. Exact where scales have 16 bits; with float32 ones, scale * zero is
    rounded once.
    Raises ValueError for scales that are not finite.
    """
    order = None
    place = _contiguous(g.groups, g.group_size)
    if place is None:
        order = sorted_columns(g.groups)
        place = _contiguous(g.groups[order], g.group_size)
        if place is None:
            order = order_of_lanes(g.groups)
        # Rows of the transpose: formats that pack along in have them contiguous.
        g = g._replace(q=g.q.t().index_select(0, order).t(), groups=g.groups[order])
    if place is not None:
        first, last, offset = place
        used, g_idx = torch.arange(first, last), None
    else:
        used, inverse = torch.unique(g.groups.long(), return_inverse=True)
        g_idx, offset = inverse.int(), 0
    half = 1 << (g.bits - 1)
    scales = g.scales[:, used]
    zero = torch.full_like(scales, half, dtype=torch.int32) if g.zero is None else g.zero[:, used].int()
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales: not finite")
    size = -(-g.group_size // 16) * 16 if used.numel() <= 1 else g.group_size
    if g.bits <= 4 and g.q.shape[1] % packed.CHUNK == 0:
        scales, mins = _affine(scales, -zero)
        return packed.pack_int4(g.q, scales, mins, size, group_offset=offset, g_idx=g_idx, x_perm=order)
    scales, mins = _affine(scales, half - zero)
    centred = (g.q.to(torch.int16) - half).to(torch.int8)
    low = mins if bool((zero != half).any()) else None
    return packed.pack_int8(centred, scales, low, size, group_offset=offset, g_idx=g_idx, x_perm=order)


def _contiguous(groups: Tensor, group_size: int) -> tuple[int, int, int] | None:
    """(first group, last + 1, columns of the first one that lie before) when groups are runs in order."""
    n = groups.numel()
    if n == 0:
        return 0, 0, 0
    first, last = int(groups[0]), int(groups[-1])
    head = int((groups == first).sum())
    offset = group_size - head if last > first else 0
    if offset < 0 or offset + n > (last - first + 1) * group_size:
        return None
    expected = (torch.arange(n) + offset) // group_size + first
    return (first, last + 1, offset) if torch.equal(expected, groups.long()) else None


def _affine(scales: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, scales * factor) in float16 where both are exact there, otherwise in float32."""
    wide = scales.float()
    mins = wide * factor
    halves = [t.clamp(-_HALF_MAX, _HALF_MAX).half() for t in (wide, mins)]
    if all(torch.equal(h.float(), t) for h, t in zip(halves, (wide, mins), strict=True)):
        return halves[0].contiguous(), halves[1].contiguous()
    return wide.contiguous(), mins.contiguous()
