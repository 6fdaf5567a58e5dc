"""The attention call: validates its arguments into one record and hands it to dispatch."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .indices import as_int32, per_sequence
from .ops import DTYPES, call_attention, refuse_grad
from .spec import AttentionArgs
from .strides import contiguous_rows

Window = Sequence[int | None] | None
_WIDEST = 1 << 40  # past any position: a wider window sees no more, and sums with it must not overflow


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    q_pos0: Tensor | None = None,
    k_pos0: Tensor | None = None,
    kv_layout: str = "nhd",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention, on the fastest backend that can run the call.

    Args:
        q: (B, Sq, H, D), or packed (total_q, H, D) with ``cu_seqlens_q``. float32, float16, bfloat16 or
            float64.
        k, v: (B, Sk, Hkv, D) and (B, Sk, Hkv, Dv); packed (total_k, Hkv, D) with ``cu_seqlens_k``; or
            pages (P, page, Hkv, D) with ``block_table``. Hkv divides H: query head h reads h // (H / Hkv).
        causal: bottom-right aligned: query i sees keys j <= i + Sk - Sq.
        window: (left, right) keys visible on either side of a query's position, inclusive; None or -1:
            unbounded.
        softcap: s becomes ``softcap * tanh(s / softcap)``; 0: off.
        alibi_slopes: float32 (H,) or (B, H); adds ``-slope * |query position - key position|``.
        sinks: (H,), one learned logit per head in the softmax's denominator.
        attn_mask: bool (True: keep) or additive, broadcastable to (B, H, Sq, Sk), where Sk counts all rows
            of k, or of a sequence's pages; not with packed q or k.
        scale: of the scores; None: ``1 / sqrt(D)``.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), cumulative lengths of packed sequences.
        max_seqlen_q, max_seqlen_k: upper bounds of the packed lengths; None: the total.
        block_table: int32 (B, max_pages), the pages of each sequence.
        cache_seqlens: int32 (B,) or int: keys present of each sequence in k and v.
        cache_batch_idx: int32 (B,): the row of k and v that each sequence reads.
        cache_leftpad: int32 (B,): index of each sequence's first valid key; positions count from it. A
            sequence whose keys all come before it has none.
        q_pos0, k_pos0: int32 (B,): position of the first query and key, in place of the bottom-right rule.
        kv_layout: "nhd", or "npu_nz" (Ascend's fractal format).
        k_scale, v_scale: float32 (Hkv,), for keys and values stored in a narrower type.
        return_lse: also return the log-sum-exp.
        backend: use this backend or refuse.

    Returns:
        (B, Sq, H, Dv) or (total_q, H, Dv) in q's dtype; with ``return_lse`` also float32 (B, H, Sq) or
        (H, total_q), natural log. A query that sees no key gives 0 and -inf.

    Raises:
        ValueError: an argument is inconsistent; says which, what it was and what is accepted.
        UnsupportedError: no backend, or not the one named, can run the call; says every reason.
    """
    args = build_args(
        q, k, v, causal=causal, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        attn_mask=attn_mask, scale=scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, block_table=block_table,
        cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad,
        q_pos0=q_pos0, k_pos0=k_pos0, kv_layout=kv_layout, k_scale=k_scale, v_scale=v_scale,
        return_lse=return_lse,
    )  # fmt: skip
    out, lse = call_attention(args, backend)
    return (out, lse) if return_lse else out


def build_args(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    q_pos0: Tensor | None = None,
    k_pos0: Tensor | None = None,
    kv_layout: str = "nhd",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
) -> AttentionArgs:
    """The validated record of an `attention` call. Reads shapes and dtypes, never tensor values."""
    refuse_grad(q=q, k=k, v=v, attn_mask=attn_mask, alibi_slopes=alibi_slopes, sinks=sinks)
    heads, kv_heads, head_dim = _check_qkv(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, k_scale, v_scale)
    batch = cu_seqlens_q.shape[0] - 1 if cu_seqlens_q is not None else q.shape[0]
    cache_seqlens = per_sequence("cache_seqlens", cache_seqlens, batch, q.device)

    if block_table is not None:
        if block_table.ndim != 2:
            raise ValueError(f"block_table: {tuple(block_table.shape)}, expected (batch, max_pages)")
        max_pages = block_table.shape[1]
        block_table = _int32("block_table", block_table, q, batch, max_pages)
        if cache_seqlens is None:
            raise ValueError("block_table: needs cache_seqlens, the keys present of each sequence")
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k: k is paged (block_table); cache_seqlens gives its lengths")
        key_rows = max_pages * k.shape[1]
    else:
        key_rows = k.shape[0] if k.ndim == 3 else k.shape[1]
        if k.ndim == 4 and cache_batch_idx is None and k.shape[0] != batch:
            raise ValueError(f"k: batch {k.shape[0]}, q has {batch} (cache_batch_idx would select rows)")
    if cache_batch_idx is not None and (block_table is not None or k.ndim == 3):
        raise ValueError("cache_batch_idx: selects rows of a contiguous cache; k is paged or packed")

    left, right = _window(window)
    if not 0 <= softcap < math.inf:
        raise ValueError(f"softcap: {softcap}, expected a finite number >= 0")
    if scale is not None and not abs(scale) < math.inf:
        raise ValueError(f"scale: {scale}, expected a finite number")
    if kv_layout not in ("nhd", "npu_nz"):
        raise ValueError(f"kv_layout: {kv_layout!r}, expected 'nhd' or 'npu_nz'")
    return AttentionArgs(
        q=contiguous_rows(q),
        k=contiguous_rows(k),
        v=contiguous_rows(v),
        scale=head_dim**-0.5 if scale is None else float(scale),
        causal=bool(causal),
        window=(left, None if causal else right),
        softcap=float(softcap),
        alibi_slopes=_float32("alibi_slopes", alibi_slopes, q, (heads,), (batch, heads)),
        sinks=_float32("sinks", sinks, q, (heads,)),
        attn_mask=_mask(attn_mask, q, k, (batch, heads), key_rows),
        cu_seqlens_q=_int32("cu_seqlens_q", cu_seqlens_q, q, batch + 1),
        cu_seqlens_k=_int32("cu_seqlens_k", cu_seqlens_k, q, batch + 1),
        max_seqlen_q=q.shape[-3] if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=key_rows if max_seqlen_k is None else max_seqlen_k,
        block_table=block_table,
        seqused_k=_int32("cache_seqlens", cache_seqlens, q, batch),
        cache_batch_idx=_int32("cache_batch_idx", cache_batch_idx, q, batch),
        cache_leftpad=_int32("cache_leftpad", cache_leftpad, q, batch),
        q_pos0=_int32("q_pos0", q_pos0, q, batch),
        k_pos0=_int32("k_pos0", k_pos0, q, batch),
        kv_layout=kv_layout,
        k_scale=_float32("k_scale", k_scale, q, (kv_heads,)),
        v_scale=_float32("v_scale", v_scale, q, (kv_heads,)),
        return_lse=bool(return_lse),
    )


def _check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> tuple[int, int, int]:
    if q.dtype not in DTYPES:
        raise ValueError(f"q: {q.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, t, scaled in (("k", k, k_scale), ("v", v, v_scale)):
        if t.dtype != q.dtype and scaled is None:
            raise ValueError(f"{name}: {t.dtype}, q is {q.dtype} (a narrower type needs {name}_scale)")
        _check_device(name, t, q)
    if v.dtype != k.dtype:
        raise ValueError(f"v: {v.dtype}, k is {k.dtype}")
    check_rank("q", q, "cu_seqlens_q", cu_seqlens_q)
    check_rank("k", k, "cu_seqlens_k", None if block_table is not None else cu_seqlens_k)
    check_rank("v", v, "cu_seqlens_k", None if block_table is not None else cu_seqlens_k)
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    if k.shape[-1] != head_dim:
        raise ValueError(f"k: head_dim {k.shape[-1]}, q has {head_dim}")
    if head_dim == 0 or v.shape[-1] == 0:
        raise ValueError(f"head_dim: {head_dim} of q, {v.shape[-1]} of v, expected at least 1")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: {tuple(v.shape)}, expected k's {tuple(k.shape[:-1])} and its own head_dim")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads, expected a divisor of q's {heads}")
    if block_table is not None and k.shape[1] == 0:
        raise ValueError("k: pages of 0 rows, expected at least 1")
    return heads, kv_heads, head_dim


def check_rank(name: str, t: Tensor, cu_name: str = "", cu_seqlens: Tensor | None = None) -> None:
    """Raises ValueError unless ``t`` is dense, or with ``cu_seqlens`` packed, by its number of dimensions."""
    if cu_seqlens is not None and (cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1):
        raise ValueError(f"{cu_name}: {tuple(cu_seqlens.shape)}, expected (batch + 1,)")
    if t.ndim != (4 if cu_seqlens is None else 3):
        packed = f"(total, heads, head_dim) with {cu_name}"
        wanted = "(batch, seqlen, heads, head_dim)" if cu_seqlens is None else packed
        raise ValueError(f"{name}: {t.ndim} dimensions {tuple(t.shape)}, expected {wanted}")


def _check_device(name: str, t: Tensor | None, q: Tensor) -> None:
    if t is not None and t.device != q.device:
        raise ValueError(f"{name}: on {t.device}, q is on {q.device}")


def _window(window: Window) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if len(window) != 2:
        raise ValueError(f"window: {window!r}, expected (left, right)")
    left, right = map(_side, window)
    return left, right


def _side(side: int | None) -> int | None:
    if side is None:
        return None
    try:
        keys = operator.index(side)
    except TypeError:
        keys = -2
    if keys < -1:
        raise ValueError(f"window: {side!r}, each side is an integer >= 0, or None or -1 for unbounded")
    return None if keys == -1 else min(keys, _WIDEST)


def _int32(name: str, t: Tensor | None, q: Tensor, *shape: int) -> Tensor | None:
    if t is None:
        return None
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: {tuple(t.shape)}, expected {shape}")
    _check_device(name, t, q)
    return as_int32(name, t).contiguous()


def _float32(name: str, t: Tensor | None, q: Tensor, *shapes: tuple[int, ...]) -> Tensor | None:
    if t is None:
        return None
    if tuple(t.shape) not in shapes:
        raise ValueError(f"{name}: {tuple(t.shape)}, expected {' or '.join(map(str, shapes))}")
    _check_device(name, t, q)
    return t.to(torch.float32).contiguous()


def _mask(
    mask: Tensor | None, q: Tensor, k: Tensor, batch_heads: tuple[int, int], key_rows: int
) -> Tensor | None:
    if mask is None:
        return None
    if q.ndim == 3 or k.ndim == 3:
        raise ValueError("attn_mask: needs dense q and k; packed sequences have no common (Sq, Sk)")
    if mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise ValueError(f"attn_mask: {mask.dtype}, expected bool, float32 or q's {q.dtype}")
    _check_device("attn_mask", mask, q)
    shape = (*batch_heads, q.shape[1], key_rows)
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"attn_mask: {tuple(mask.shape)}, expected broadcastable to {shape}")
    return mask.expand(shape)
