"""Attention over a KV cache: one call a part, partial results merged by their log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..spec import KvCache, KvPart, KvStep


def narrow(step: KvStep, lo: int, hi: int) -> KvStep:
    """The step of packed rows [lo, hi) alone.

    Keys of later rows do not count as present, so with ascending ranges each tile sees exactly what the
    whole step would have shown it.
    """
    if lo == 0 and hi == step.slots.shape[0]:
        return step
    cu = step.cu_seqlens.clamp(lo, hi) - lo
    new = cu.diff()
    starts = step.seqused - step.cu_seqlens.diff()
    seqused = starts + (step.cu_seqlens[1:].clamp(max=hi) - step.cu_seqlens[:-1]).clamp(min=0)
    counts = new.tolist()
    return step._replace(
        new=tuple(counts),
        cu_seqlens=cu,
        positions=step.positions[lo:hi],
        slots=step.slots[lo:hi],
        seqused=seqused,
        max_new=max(counts, default=0),
    )


def attend(cache: KvCache, layer: int, step: KvStep, q: Tensor, **options: Any) -> Tensor:
    """Causal attention of the step's queries (total, H, D) over everything the cache holds of them.

    ``options`` are those of `fastattn.attention` (window, softcap, alibi_slopes, sinks, scale, backend).
    Returns (total, H, Dv) in q's dtype.
    """
    parts = cache.parts(layer, step)
    if len(parts) == 1 and parts[0].heads == slice(None) and parts[0].k.device == q.device:
        out: Tensor = _call(parts[0], step, q, options, return_lse=False)
        return out
    return _merge(parts, step, q, options)


def _call(part: KvPart, step: KvStep, q: Tensor, options: dict[str, Any], return_lse: bool) -> Any:
    positions: dict[str, Any] = {}
    if part.pos0 is not None:
        positions = {"k_pos0": part.pos0, "q_pos0": _first_positions(step)}
    return attention(
        q, part.k, part.v, causal=True, cu_seqlens_q=step.cu_seqlens, max_seqlen_q=step.max_new,
        max_seqlen_k=step.max_used, block_table=part.block_table, cache_seqlens=part.seqused,
        kv_layout=part.layout, k_scale=part.k_scale, v_scale=part.v_scale, return_lse=return_lse,
        **positions, **options,
    )  # fmt: skip


def _first_positions(step: KvStep) -> Tensor:
    return step.seqused - step.cu_seqlens.diff()


def _merge(parts: tuple[KvPart, ...], step: KvStep, q: Tensor, options: dict[str, Any]) -> Tensor:
    """Parts may hold different tokens, heads or both, each on a device of its own.

    Queries go to the parts and results come back; a sink enters once, at the end.
    """
    options = dict(options)
    sinks = options.pop("sinks", None)
    total, heads, _ = q.shape
    out = q.new_zeros((total, heads, parts[0].v.shape[-1]), dtype=torch.float32)
    lse = torch.full((heads, total), -torch.inf, device=q.device)
    if sinks is not None:
        lse = sinks.float()[:, None].expand(heads, total).clone()
    for part, mine in zip(parts, _query_heads(parts, heads), strict=True):
        device = part.k.device
        there = step._replace(cu_seqlens=step.cu_seqlens.to(device), seqused=step.seqused.to(device))
        found = _call(part, there, q[:, mine].to(device), _for_heads(options, mine, device), return_lse=True)
        part_out, part_lse = (t.to(q.device) for t in found)
        merged = torch.logaddexp(lse[mine], part_lse)
        base = merged.masked_fill(merged == -torch.inf, 0.0)
        keep, add = (torch.exp(x - base).T[..., None] for x in (lse[mine], part_lse))
        out[:, mine] = out[:, mine] * keep + part_out.float() * add
        lse[mine] = merged
    return out.to(q.dtype)


def _query_heads(parts: tuple[KvPart, ...], heads: int) -> list[slice]:
    """The query heads, of ``heads``, that read each part."""
    held = [range(lo := p.heads.start or 0, lo + p.k.shape[-2]) for p in parts]
    kv_heads = max(span.stop for span in held)
    for part, span in zip(parts, held, strict=True):
        if range(kv_heads)[part.heads] != span:
            raise ValueError(f"heads: {part.heads} of {kv_heads} KV heads, the part has {len(span)}")
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"parts: {kv_heads} KV heads, expected a divisor of q's {heads}")
    group = heads // kv_heads
    return [slice(span.start * group, span.stop * group) for span in held]


def _for_heads(options: dict[str, Any], heads: slice, device: torch.device) -> dict[str, Any]:
    slopes = options.get("alibi_slopes")
    return options if slopes is None else {**options, "alibi_slopes": slopes[..., heads].to(device)}
