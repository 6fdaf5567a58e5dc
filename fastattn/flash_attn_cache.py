"""flash_attn's attention to a KV cache that a call may first append to; semantics as in `flash_attn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention import Window, build_args, check_rank
from .indices import per_sequence, readable
from .ops import append_kv, call_attention, rotary
from .spec import AttentionArgs


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
        k_cache, v_cache: (B_cache, S_cache, Hkv, D), or pages (P, page, Hkv, D) with ``block_table``. Any
            strides but the last, which is 1.
        k, v: new (B, Snew, Hkv, D), written at ``cache_seqlens`` and on.
        rotary_cos, rotary_sin: (max_position, rotary_dim / 2). Keys are rotated to their index in the cache
            (left padding included); queries to ``cache_seqlens`` and on when causal or windowed, else all
            to ``cache_seqlens``.
        cache_seqlens: int32 (B,) or int, keys present before the append; needed with k and with pages.
        cache_batch_idx: int32 (B,), the cache row of each sequence. Where several have the same one and k is
            given, any of their keys may be the one that is kept.
        cache_leftpad: int32 (B,), index of each sequence's first valid key.
        num_splits: a hint in flash_attn; backends choose theirs.

    Returns:
        out (B, Sq, H, Dv); with ``return_softmax_lse`` (out, lse (B, H, Sq) float32).

    Raises:
        ValueError: an argument is inconsistent, or on a CPU a new row lies outside its sequence's cache;
            the cache is unchanged.
    """
    if (k is None) != (v is None):
        raise ValueError("k and v: give both or neither")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin: give both or neither")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos: needs new keys and values (k, v) to append")
    if k is not None and cache_seqlens is None:
        raise ValueError("cache_seqlens: needed to append k and v")
    # Everything is validated before anything is written: a refused call leaves the cache as it was.
    check_rank("q", q)
    _check_tensors(q, k_cache, v_cache, k, v)
    new = 0 if k is None else k.shape[1]
    used = per_sequence("cache_seqlens", cache_seqlens, q.shape[0], q.device)
    args = build_args(
        q, k_cache, v_cache, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        scale=softmax_scale, block_table=block_table,
        cache_seqlens=used + new if new and used is not None else used,
        cache_batch_idx=cache_batch_idx, cache_leftpad=cache_leftpad, return_lse=return_softmax_lse,
    )  # fmt: skip
    if k is not None and v is not None and used is not None:
        rows = used.long()[:, None] + torch.arange(max(new, q.shape[1]), device=q.device)
        slots = _slots(rows[:, :new], args)
        rotation: dict[str, Any] = {}
        if rotary_cos is not None and rotary_sin is not None:
            capacity = _capacity(args)
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


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_rank(name, cache)
        # Attention would read a copy, taken before the append.
        if cache.stride(-1) != 1 and cache.shape[-1] != 1:
            raise ValueError(f"{name}: strides {cache.stride()}, expected a contiguous last dimension")
    if k is None or v is None:
        return
    for name, t, cache in (("k", k, k_cache), ("v", v, v_cache)):
        check_rank(name, t)
        expected = (q.shape[0], k.shape[1])
        if tuple(t.shape[:2]) != expected:
            raise ValueError(f"{name}: {tuple(t.shape)}, expected {(*expected, *cache.shape[2:])}")


def _capacity(a: AttentionArgs) -> int:
    """Keys that the cache can hold of a sequence."""
    return a.k.shape[1] * (1 if a.block_table is None else a.block_table.shape[1])


def _slots(rows: Tensor, a: AttentionArgs) -> Tensor:
    """Flat cache slots (B * Snew,) of key index ``rows`` (B, Snew) of each sequence.

    A row outside its sequence's cache would land in another's. Where values may be read that is a ValueError;
    elsewhere such a row gets the slot past the end, which is skipped.
    """
    pages, page = a.k.shape[:2]
    capacity = _capacity(a)
    if a.block_table is not None:
        # One more page that is none, for rows past the last.
        table = torch.nn.functional.pad(a.block_table.long(), (0, 1), value=-1)
        home = table.gather(1, (rows // page).clamp(0, a.block_table.shape[1]))
    else:
        home = torch.arange(rows.shape[0], device=rows.device)[:, None].expand(rows.shape)
        if a.cache_batch_idx is not None:
            home = a.cache_batch_idx.long()[home]
    outside = (rows < 0) | (rows >= capacity) | (home < 0) | (home >= pages)
    if readable(rows) and bool(outside.any()):
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
