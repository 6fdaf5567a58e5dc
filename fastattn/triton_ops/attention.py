"""Attention: from the call's record to launches of the kernels in `kernels.attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import AttentionArgs
from . import launch
from .device import Chip, chip
from .kernels.attention import attention_kernel, combine_kernel
from .launch import Launch
from .tiles import Need, Tile, tile

#: Rows of queries up to which a call is bound by reading keys: they fit one program.
DECODE_ROWS = 64
#: Pieces of a sequence's keys at most: `combine_kernel` holds one row of each.
MAX_SPLITS = 64
#: Keys that a piece has at least: below, its fixed costs outweigh what it reads.
SPLIT_KEYS = 128
_FAR = 1 << 30  # `kernels.attention.FAR`


class Plan(NamedTuple):
    """How a call is spread over programs."""

    tile: Tile
    pack: bool = False  # the query heads of a KV head share a program
    splits: int = 1  # pieces of a sequence's keys
    tma: bool = False  # keys and values come through tensor descriptors
    specialize: bool = False  # warps that load and warps that compute (Triton's warp specialization)


def attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    """(out, lse); lse is empty unless asked for. Rows past the last packed sequence are 0 and -inf.

    Reads no value of a tensor, so it never synchronises and a CUDA graph can capture it.
    """
    return run(a, plan(a, chip(a.q.device)))


def run(a: AttentionArgs, p: Plan) -> tuple[Tensor, Tensor]:
    """`attention` by a given plan."""
    out, lse = _results(a)
    launch.run(launches(a, p, out, lse), a.q.device)
    return out, lse


# ------------------------------------------------------------------------------------------------ planning
def plan(a: AttentionArgs, c: Chip) -> Plan:
    """The plan for a call on a chip: of shapes and bounds that the host knows, never of values."""
    heads, group = a.q.shape[-2], a.q.shape[-2] // a.k.shape[-2]
    pack = group > 1 and a.max_seqlen_q * group <= DECODE_ROWS
    rows = a.max_seqlen_q * (group if pack else 1)
    width = next_power_of_2(max(a.q.shape[-1], a.v.shape[-1], 16))
    t = tile(c, Need(rows <= DECODE_ROWS, width, a.q.element_size()))
    t = t._replace(block_m=min(t.block_m, max(16, next_power_of_2(rows))))
    programs = _batch(a) * heads // (group if pack else 1) * -(-rows // t.block_m)
    splits = _splits(programs, _keys(a, rows), t.block_n, c.processors)
    tma = c.tma and not _against_descriptors(a, t)
    return Plan(t, pack, splits, tma)


def _batch(a: AttentionArgs) -> int:
    return a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1


def _keys(a: AttentionArgs, rows: int) -> int:
    """Upper bound of the keys that a program walks."""
    left, right = a.bounds()
    return a.max_seqlen_k if left is None or right is None else min(a.max_seqlen_k, left + right + rows)


def _splits(programs: int, keys: int, block_n: int, processors: int) -> int:
    """Pieces that fill the processors, two programs on each: the fewest within 85 % of the fullest waves.

    The rule of flash-attention's ``num_splits_heuristic``.
    """
    slots = 2 * processors
    if not programs or programs >= 0.8 * slots:
        return 1
    most = max(1, min(MAX_SPLITS, keys // max(SPLIT_KEYS, block_n)))
    filled = [(n * programs / slots) / -(-n * programs // slots) for n in range(1, most + 1)]
    return next(n for n, f in enumerate(filled, 1) if f >= 0.85 * max(filled))


def _against_descriptors(a: AttentionArgs, t: Tile) -> bool:
    """Whether keys and values cannot come through tensor descriptors."""
    if a.block_table is not None and (a.k.shape[1] % t.block_n or a.cache_leftpad is not None):
        return True  # a block of keys would cross pages
    return any(
        x.data_ptr() % 16
        or not x.numel()
        or any(s <= 0 or s * x.element_size() % 16 for s in x.stride()[:-1])
        for x in (a.k, a.v)
    )


# ---------------------------------------------------------------------------------------------- launching
def _results(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    packed = a.cu_seqlens_q is not None
    shape = (*a.q.shape[:-1], a.v.shape[-1])
    # Programs write the rows of sequences; packed rows past the last one belong to none.
    out = a.q.new_zeros(shape) if packed else a.q.new_empty(shape)
    if not a.return_lse:
        return out, a.q.new_empty((0,), dtype=torch.float32)
    lse_shape = (*a.q.shape[:-3], a.q.shape[-2], a.q.shape[-3])
    lse = a.q.new_empty(lse_shape, dtype=torch.float32)
    return out, lse.fill_(-torch.inf) if packed else lse


def launches(a: AttentionArgs, p: Plan, out: Tensor, lse: Tensor) -> list[Launch]:
    """What computes ``out`` and, unless it is empty, ``lse``."""
    if not out.numel():
        return []
    lse_out = lse if a.return_lse else None
    if p.splits == 1:
        return [_attend(a, p, out, lse_out)]
    rows = out.shape[:-1] if out.ndim == 4 else (1, *out.shape[:-1])
    part = out.new_empty((p.splits, *rows, out.shape[-1]), dtype=torch.float32)
    part_lse = out.new_empty((p.splits, rows[0], rows[2], rows[1]), dtype=torch.float32)
    return [_attend(a, p, part, part_lse), _combine(a, p, part, part_lse, out, lse_out)]


def _attend(a: AttentionArgs, p: Plan, out: Tensor, lse: Tensor | None) -> Launch:
    heads, head_dim = a.q.shape[-2:]
    group, v_head_dim = heads // a.k.shape[-2], a.v.shape[-1]
    block_d, block_dv = (max(16, next_power_of_2(n)) for n in (head_dim, v_head_dim))
    pack = group if p.pack else 1
    paged = a.block_table is not None
    max_pages = a.block_table.shape[1] if a.block_table is not None else 0
    page = a.k.shape[1] if paged else 0
    kv_len = a.k.shape[0] if a.k.ndim == 3 else page * max_pages if paged else a.k.shape[1]
    left, right = a.bounds()
    mask = a.attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    mask_strides = (0, 0, 0, 0) if mask is None else mask.expand(*_mask_shape(a, kv_len)).stride()
    alibi_batch = a.alibi_slopes.stride(0) if a.alibi_slopes is not None and a.alibi_slopes.ndim == 2 else 0
    k: Any = a.k
    v: Any = a.v
    if p.tma:
        k, v = _descriptor(a.k, p.tile.block_n, block_d), _descriptor(a.v, p.tile.block_n, block_dv)
    lse_strides = (0, 0, 0) if lse is None else (lse.stride(0), *_strides(lse, 3)[:2])
    split = p.splits > 1
    out_split = out.stride(0) if split else 0
    if split:
        assert lse is not None
        lse_strides = (lse.stride(0), lse.stride(1), lse.stride(2))
    elif lse is not None:
        lse_strides = (0, *_strides(lse, 3)[:2])
    args = (
        a.q, k, v, out, lse,
        a.alibi_slopes, None if split else a.sinks, mask, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table,
        a.seqused_k, a.cache_batch_idx, a.cache_leftpad, a.q_pos0, a.k_pos0, a.k_scale, a.v_scale,
        a.scale, a.softcap, _bounded(left), _bounded(right),
        a.max_seqlen_q, a.q.shape[0], a.k.shape[0], kv_len, max_pages,
        *_strides(a.q, 4)[:3], *_strides(a.k, 4)[:3], *_strides(a.v, 4)[:3],
        out_split, *_strides(out, 4)[-4:-1], *lse_strides, *mask_strides, alibi_batch,
    )  # fmt: skip
    constants = (
        heads, group, head_dim, v_head_dim, block_d, block_dv, page, left is not None, right is not None,
        a.softcap > 0, a.scale <= 0, _precision(a), p.tma, p.specialize, p.splits, pack,
        p.tile.block_m, p.tile.block_n,
    )  # fmt: skip
    programs = -(-a.max_seqlen_q * pack // p.tile.block_m) * p.splits * (heads // pack) * _batch(a)
    return Launch(attention_kernel, programs, args, constants, p.tile.num_warps, p.tile.num_stages)


def _combine(
    a: AttentionArgs, p: Plan, part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None
) -> Launch:
    heads, v_head_dim = out.shape[-2:]
    lse_strides = (0, 0) if lse is None else _strides(lse, 3)[:2]
    args = (
        part, part_lse, out, lse, a.sinks, a.cu_seqlens_q, a.max_seqlen_q, a.q.shape[0],
        *part.stride()[:4], *part_lse.stride()[:3], *_strides(out, 4)[:3], *lse_strides,
    )  # fmt: skip
    block_dv, block_splits = max(16, next_power_of_2(v_head_dim)), next_power_of_2(p.splits)
    constants = (heads, v_head_dim, block_dv, p.splits, block_splits)
    return Launch(combine_kernel, a.max_seqlen_q * heads * _batch(a), args, constants, 4, 1)


def _strides(t: Tensor, ndim: int) -> tuple[int, ...]:
    """Strides of ``t``, which lacks its batch dimension when packed: its stride is 0."""
    return t.stride() if t.ndim >= ndim else (0, *t.stride())


def _mask_shape(a: AttentionArgs, kv_len: int) -> tuple[int, int, int, int]:
    return a.q.shape[0], a.q.shape[2], a.q.shape[1], kv_len


def _descriptor(t: Tensor, block_n: int, block_d: int) -> Any:
    """Of k or v as (row or page, key, head, dimension); a packed batch is one row."""
    t = t if t.ndim == 4 else t[None]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, block_n, 1, block_d])


def _bounded(side: int | None) -> int:
    return 0 if side is None else min(side, _FAR)


def _precision(a: AttentionArgs) -> str:
    """Of float32 products, as torch.set_float32_matmul_precision asks: highest, high or medium."""
    if a.q.dtype != torch.float32:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
