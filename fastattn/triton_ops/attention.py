"""Attention: from the call's record to launches of the kernels `attention` and `combine`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import AttentionArgs
from . import launch
from .device import chip
from .kernels.attention import attention_kernel
from .kernels.combine import combine_kernel
from .launch import Launch
from .plan import Plan, batch, has_absent_keys, plan

_FAR = 1 << 30  # `kernels.attention.FAR`


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


def _results(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    packed = a.cu_seqlens_q is not None
    shape = (*a.q.shape[:-1], a.v.shape[-1])
    # Programs write the rows of sequences; packed rows past the last one belong to none.
    out = a.q.new_zeros(shape) if packed else a.q.new_empty(shape)
    if not a.return_lse:
        return out, a.q.new_empty((0,), dtype=torch.float32)
    lse = a.q.new_empty(_lse_shape(a), dtype=torch.float32)
    return out, lse.fill_(-torch.inf) if packed else lse


def _lse_shape(a: AttentionArgs) -> tuple[int, ...]:
    return (*a.q.shape[:-3], a.q.shape[-2], a.q.shape[-3])


def launches(a: AttentionArgs, p: Plan, out: Tensor, lse: Tensor) -> list[Launch]:
    """What computes ``out`` and, unless it is empty, ``lse``."""
    if not out.numel():
        return []
    lse_out = lse if a.return_lse else None
    if p.splits == 1:
        return [_attend(a, p, out, lse_out)]
    part = out.new_empty((p.splits, *out.shape), dtype=torch.float32)
    part_lse = out.new_empty((p.splits, *_lse_shape(a)), dtype=torch.float32)
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
    q: Any = a.q
    k: Any = a.k
    v: Any = a.v
    if p.specialize:
        rows = a.q.view(-1, heads * head_dim)
        q = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [p.tile.block_m, block_d])
    if p.tma:
        k, v = _descriptor(a.k, p.tile.block_n, block_d), _descriptor(a.v, p.tile.block_n, block_dv)
    pieces = p.splits > 1
    out_strides = _piece_strides(out, 4) if pieces else (0, *_strides(out, 4))
    lse_strides: tuple[int, ...] = (0, 0, 0)
    if lse is not None:
        lse_strides = _piece_strides(lse, 3) if pieces else (0, *_strides(lse, 3))
    args = (
        q, k, v, out, lse,
        a.alibi_slopes, None if pieces else a.sinks, mask, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table,
        a.seqused_k, a.cache_batch_idx, a.cache_leftpad, a.q_pos0, a.k_pos0, a.k_scale, a.v_scale,
        a.scale, a.softcap, _bounded(left), _bounded(right),
        a.max_seqlen_q, a.q.shape[0], a.k.shape[0], kv_len, max_pages,
        *_strides(a.q, 4)[:3], *_strides(a.k, 4)[:3], *_strides(a.v, 4)[:3],
        *out_strides[:4], *lse_strides[:3], *mask_strides, alibi_batch,
    )  # fmt: skip
    constants = (
        heads, group, head_dim, v_head_dim, block_d, block_dv, page, left is not None, right is not None,
        a.softcap > 0, a.scale <= 0 or a.k_scale is not None, _precision(a),
        p.tma, p.specialize, has_absent_keys(a), p.splits, pack, p.tile.block_m, p.tile.block_n,
    )  # fmt: skip
    programs = -(-a.max_seqlen_q * pack // p.tile.block_m) * p.splits * (heads // pack) * batch(a)
    # Triton divides its stages among loads that wait for loads: pages, then the keys in them.
    stages = 2 * p.tile.num_stages - 1 if paged else p.tile.num_stages
    return Launch(attention_kernel, programs, args, constants, p.tile.num_warps, stages)


def _combine(
    a: AttentionArgs, p: Plan, part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None
) -> Launch:
    heads, v_head_dim = out.shape[-2:]
    lse_strides = (0, 0) if lse is None else _strides(lse, 3)[:2]
    args = (
        part, part_lse, out, lse, a.sinks, a.cu_seqlens_q, a.max_seqlen_q, a.q.shape[0],
        *_piece_strides(part, 4)[:4], *_piece_strides(part_lse, 3)[:3], *_strides(out, 4)[:3], *lse_strides,
    )  # fmt: skip
    block_dv, block_splits = max(16, next_power_of_2(v_head_dim)), next_power_of_2(p.splits)
    constants = (heads, v_head_dim, block_dv, p.splits, block_splits)
    return Launch(combine_kernel, a.max_seqlen_q * heads * batch(a), args, constants, 4, 1)


def _strides(t: Tensor, ndim: int) -> tuple[int, ...]:
    """Strides of ``t``, which lacks its batch dimension when packed: its stride is 0."""
    return t.stride() if t.ndim >= ndim else (0, *t.stride())


def _piece_strides(t: Tensor, ndim: int) -> tuple[int, ...]:
    """Strides of ``t``, whose first dimension is the pieces of the keys."""
    first, *rest = t.stride()
    return (first, *rest) if len(rest) == ndim else (first, 0, *rest)


def _mask_shape(a: AttentionArgs, kv_len: int) -> tuple[int, int, int, int]:
    return a.q.shape[0], a.q.shape[2], a.q.shape[1], kv_len


def _descriptor(t: Tensor, block_n: int, block_d: int) -> Any:
    """Of k or v as (row or page, key, head, dimension); a packed batch is one row."""
    t = t if t.ndim == 4 else t[None]
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, block_n, 1, block_d])


def _bounded(side: int | None) -> int:
    return 0 if side is None else min(side, _FAR)


def _precision(a: AttentionArgs) -> str:
    """Of float32 products, as torch.set_float32_matmul_precision asks: highest, high or medium.

    ``torch.backends``' fp32_precision, torch's newer way to ask, knows ieee and tf32 only. The older one sets
    it as well, both high and medium to tf32: where it is ieee, that was asked last.
    """
    if a.q.dtype != torch.float32 or getattr(torch.backends.cuda.matmul, "fp32_precision", "") == "ieee":
        return "ieee"
    try:
        asked = torch.get_float32_matmul_precision()
    except RuntimeError:  # asked in the newer way alone
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[asked]
