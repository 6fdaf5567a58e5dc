"""flash_attn's functions, with its signatures and semantics: change the import and the model runs.

Differences, both stated in the docstrings: nothing here has a backward pass or dropout (UnsupportedError),
and the log-sum-exp of a query that sees no key is -inf where flash_attn gives +inf.
Source of the signatures: flash_attn 2.8, ``flash_attn/flash_attn_interface.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Window, attention, build_args
from .ops import append_kv, call_attention, rotary
from .spec import AttentionArgs, UnsupportedError

Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (B, Sq, H, D) over k, v (B, Sk, Hkv, D); causal is bottom-right aligned.

    Returns out (B, Sq, H, Dv), or with ``return_attn_probs`` (out, lse (B, H, Sq) float32, None): the
    probabilities exist only under dropout. ``deterministic`` concerns the backward pass.
    """
    _no_dropout(dropout_p)
    return _with_probs(
        attention(
            q, k, v, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            scale=softmax_scale, return_lse=return_attn_probs,
        )
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with kv (B, Sk, 2, Hkv, D)."""
    k, v = _unpack(kv, "kv", 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with qkv (B, S, 3, H, D)."""
    q, k, v = _unpack(qkv, "qkv", 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Packed sequences: q (total_q, H, D), k and v (total_k, Hkv, D), int32 ``cu_seqlens`` (B + 1,).

    With ``block_table`` (B, max_pages), k and v are pages (P, page, Hkv, D) and ``cu_seqlens_k`` gives
    their lengths. ``return_attn_probs`` gives (out, lse (H, total_q), None).
    """
    _no_dropout(dropout_p)
    paged = block_table is not None
    return _with_probs(
        attention(
            q, k, v, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            scale=softmax_scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=None if paged else cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, block_table=block_table,
            cache_seqlens=cu_seqlens_k.diff() if paged else None, return_lse=return_attn_probs,
        )
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with kv (total_k, 2, Hkv, D)."""
    k, v = _unpack(kv, "kv", 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with qkv (total, 3, H, D)."""
    q, k, v = _unpack(qkv, "qkv", 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache in place, then attends to it.

    Args:
        q: (B, Sq, H, D).
        k_cache, v_cache: (B_cache, S_cache, Hkv, D), or pages (P, page, Hkv, D) with ``block_table``.
        k, v: new (B, Snew, Hkv, D), written at ``cache_seqlens`` and on.
        rotary_cos, rotary_sin: (max_position, rotary_dim / 2). Keys are rotated to their index in the cache
            (left padding included); queries to ``cache_seqlens`` and on when causal or windowed, else all
            to ``cache_seqlens``.
        cache_seqlens: int32 (B,) or int, keys present before the append; needed with k and with pages.
        cache_batch_idx: int32 (B,), the cache row of each sequence.
        cache_leftpad: int32 (B,), index of each sequence's first valid key.
        num_splits: a hint in flash_attn; backends choose theirs.

    Returns:
        out (B, Sq, H, Dv); with ``return_softmax_lse`` (out, lse (B, H, Sq) float32).

    Raises:
        ValueError: an argument is inconsistent, or on a CPU a new row lies outside its sequence's cache;
            the cache is unchanged.
    """
    batch = q.shape[0]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if (k is None) != (v is None):
        raise ValueError("k and v: give both or neither")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin: give both or neither")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos: needs new keys and values (k, v) to append")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens: needed to append k and v")
    new = 0 if k is None else k.shape[1]
    # Everything is validated before anything is written: a refused call leaves the cache as it was.
    args = build_args(
        q, k_cache, v_cache, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        scale=softmax_scale, block_table=block_table,
        cache_seqlens=cache_seqlens + new if new and cache_seqlens is not None else cache_seqlens,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, return_lse=return_softmax_lse,
    )  # fmt: skip
    if k is not None and v is not None and cache_seqlens is not None:
        for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
            if t.ndim != 4 or tuple(t.shape[:2]) != (batch, new):
                expected = (batch, new, *cache.shape[2:])
                raise ValueError(f"{name}: {tuple(t.shape)}, expected {expected}")
        rows = cache_seqlens.long()[:, None] + torch.arange(max(new, q.shape[1]), device=q.device)
        slots = _slots(rows[:, :new], args)
        rotation: dict[str, Any] = {}
        if rotary_cos is not None and rotary_sin is not None:
            capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
            local = causal or any(0 <= side < capacity for side in args.window if side is not None)
            positions = rows[:, : q.shape[1]] if local else rows[:, :1].expand(-1, q.shape[1])
            cos, sin = rotary_cos.float(), rotary_sin.float()
            turned = rotary(q.flatten(0, 1), cos, sin, positions.flatten(), interleaved=rotary_interleaved)
            args = args._replace(q=turned.view(q.shape))
            rotation = {"cos": cos, "sin": sin, "positions": rows[:, :new].flatten()}
        append_kv(
            k_cache, v_cache, k.flatten(0, 1), v.flatten(0, 1), slots, **rotation,
            interleaved=rotary_interleaved and bool(rotation),
        )  # fmt: skip
    out, lse = call_attention(args, None)
    return (out, lse) if return_softmax_lse else out


def _slots(rows: Tensor, a: AttentionArgs) -> Tensor:
    """Flat cache slots (B * Snew,) of key index ``rows`` (B, Snew) of each sequence.

    A row outside its sequence's cache would land in another's. On a host that is a ValueError; on a device,
    where values are not read, such a row gets the slot past the end, which is skipped.
    """
    pages, page = a.k.shape[:2]
    if a.block_table is not None:
        capacity = a.block_table.shape[1] * page
        # One more page that is none, for rows past the last.
        table = torch.nn.functional.pad(a.block_table.long(), (0, 1), value=-1)
        home = table.gather(1, (rows // page).clamp(0, a.block_table.shape[1]))
    else:
        capacity = page
        home = torch.arange(rows.shape[0], device=rows.device)[:, None].expand(rows.shape)
        if a.cache_batch_idx is not None:
            home = a.cache_batch_idx.long()[home]
    outside = (rows < 0) | (rows >= capacity) | (home < 0) | (home >= pages)
    on_host = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and bool(outside.any()):
        b, n = (int(i) for i in outside.nonzero()[0])
        if 0 <= int(rows[b, n]) < capacity:
            source = "cache_batch_idx" if a.block_table is None else "block_table"
            raise ValueError(f"{source}: {int(home[b, n])} of sequence {b}, expected 0..{pages - 1}")
        where = "cache" if a.block_table is None else "block_table"
        first, last = (int(rows[b, i]) for i in (0, -1))
        raise ValueError(
            f"k: rows {first}..{last} of sequence {b} (from cache_seqlens on) are not in its {where}, which "
            f"has {capacity} rows"
        )
    return (home * page + rows % page).masked_fill(outside, pages * page).flatten()


def _unpack(packed: Tensor, name: str, parts: int, ndim: int) -> tuple[Tensor, ...]:
    if packed.ndim != ndim or packed.shape[-3] != parts:
        raise ValueError(f"{name}: {tuple(packed.shape)}, expected {ndim} dimensions with {parts} at -3")
    return packed.unbind(-3)


def _no_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise UnsupportedError(f"dropout_p: {dropout_p}; fastattn is an inference library, pass 0.0")


def _with_probs(result: Tensor | tuple[Tensor, Tensor]) -> Result:
    return result if isinstance(result, Tensor) else (*result, None)
