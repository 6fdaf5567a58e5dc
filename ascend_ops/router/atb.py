"""310P and 910A: the attention operators of ATB, with a KV cache in NZ.

A page of an NZ cache is stored as (Hkv * D / 16, page, 16). Limits are those of SelfAttentionOperation and
PagedAttentionOperation in CANN 9.1's documents. Their newer forms take one compressed mask for any length;
the older ones, and windows, a mask as large as the scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import masks
from .call import AttentionCall, Lengths
from .chips import Chip
from .invocation import Invocation, Results

PREFILL, PREFILL_V3 = "_npu_flash_attention", "_npu_flash_attention_v3"
CHUNK, CHUNK_V2 = "_npu_paged_attention_splitfuse", "_npu_paged_attention_splitfuse_v2"
DECODE = "_npu_paged_attention"
# MASK_TYPE_NORM_COMPRESS: the two operations count their mask types apart.
_COMPRESSED = {PREFILL_V3: 3, CHUNK_V2: 5}
LARGEST_MASK = 1 << 28  # scores of a mask as large as they are: 512 MiB
_NEVER = (
    "softcap", "alibi_slopes", "sinks", "attn_mask", "cache_batch_idx", "cache_leftpad", "q_pos0", "k_pos0",
    "k_scale", "v_scale",
)  # fmt: skip


def static_reasons(call: AttentionCall, chip: Chip) -> list[str]:
    """Against the call, whatever its lengths."""
    if DECODE not in chip.operators:
        return chip.lacks(DECODE)
    d, dv = call.head_dim, call.v_head_dim
    out = [f"{n}: not an argument of ATB's attention" for n in call.given(_NEVER)]
    if call.return_lse:
        out.append("return_lse: ATB's attention has none")
    if call.q.dtype != torch.float16 or call.k.dtype != torch.float16:
        out.append(f"dtype: {call.q.dtype} and {call.k.dtype}, {chip.family} takes float16")
    if d != dv or d % 16 or d > 256:
        out.append(f"head_dim: {d} and {dv} of v, one multiple of 16 up to 256")
    if call.right != 0:
        out.append(f"causal: ATB's operators on {chip.family} are causal")
    if call.page_size:
        if call.kv_layout != "npu_nz":
            out.append(f"kv_layout: pages on {chip.family} are NZ (kv_layout='npu_nz')")
        if call.page_size % 16 or call.page_size * d > 128 * 128:
            out.append(f"page size: {call.page_size}, a multiple of 16, with head_dim at most 16384")
        return out
    if PREFILL not in chip.operators:
        out.append(f"k: not in pages, ATB's attention on {chip.family} has no other keys")
    if call.kv_layout != "nhd":
        out.append("kv_layout: keys that are not paged are nhd")
    if call.seqused_k is not None:
        out.append("cache_seqlens: a cache must be paged")
    if call.left is not None:
        out.append("window: ATB's prefill of keys that are not paged has none")
    if (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None):
        out.append("cu_seqlens: both of q and k, or neither")
    return out


def reasons(call: AttentionCall, lens: Lengths, chip: Chip) -> list[str]:
    """Against the call with these lengths."""
    out = []
    if len(lens.q) > 2000:
        out.append(f"batch: {len(lens.q)}, at most 2000")
    if not call.page_size and lens.q != lens.k:
        out.append("k: other lengths than q; ATB's prefill needs them equal")
    rows = {PREFILL: max(lens.q), CHUNK: sum(lens.q)}.get(_operator(call, lens, chip), 0)
    if rows * max(lens.k) > LARGEST_MASK:
        out.append(
            f"k: {rows} queries of {max(lens.k)} keys, a mask as large as the scores is made for at most "
            f"{LARGEST_MASK}: prefill in chunks"
        )
    if call.page_size and any(sq > sk for sq, sk in zip(lens.q, lens.k, strict=True)):
        out.append("q: more queries than keys")
    return out


def invocation(call: AttentionCall, lens: Lengths, chip: Chip) -> Invocation:
    """The exact call; assumes that there are no reasons against it."""
    operator = _operator(call, lens, chip)
    q = (call.q.flatten(0, 1) if call.q.ndim == 4 else call.q[: sum(lens.q)]).contiguous()
    kwargs: dict[str, Any] = {
        "scale_value": call.scale, "num_heads": call.heads, "num_kv_heads": call.kv_heads,
    }  # fmt: skip
    if operator in _COMPRESSED:
        kwargs["mask_type"] = _COMPRESSED[operator]
    if call.page_size:
        kwargs |= {"query": q, "key_cache": nz_view(call.k), "value_cache": nz_view(call.v)}
        kwargs |= {"block_table": call.block_table, "context_lens": call.seqused_k}
        if operator != DECODE:
            kwargs["seq_len"] = torch.tensor(lens.q, dtype=torch.int32)
        if operator == CHUNK_V2:
            kwargs["mask"] = masks.compressed_additive(q.device)
        elif operator == CHUNK:
            ranges = [torch.arange(sk - sq, sk) for sq, sk in zip(lens.q, lens.k, strict=True)]
            rows = masks.additive_rows(torch.cat(ranges).to(q.device), max(lens.k), call.left)
            kwargs["mask"] = masks.tagged_nz(masks.to_nz(rows))
    else:
        # Rows are padded to a multiple of 16, which lengthens the last sequence: causal, so none sees more.
        padding = -q.shape[0] % 16
        k, v = (t.flatten(0, 1) if t.ndim == 4 else t[: sum(lens.k)] for t in (call.k, call.v))
        q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, padding)).contiguous() for t in (q, k, v))
        seqlens = (*lens.q[:-1], lens.q[-1] + padding)
        kwargs |= {"query": q, "key": k, "value": v, "seq_len": torch.tensor(seqlens, dtype=torch.int32)}
        if operator == PREFILL_V3:
            kwargs["mask"] = masks.compressed_nz(q.device)
        else:
            positions = torch.arange(max(seqlens), device=q.device)
            rows = masks.additive_rows(positions, max(seqlens), None)
            kwargs["mask"] = masks.tagged_nz(masks.to_nz(rows))
    out = kwargs["out"] = torch.empty_like(q)
    return Invocation("atb", operator, (), kwargs, lambda _: _finish(call, lens, out))


def nz_view(pages: Tensor) -> Tensor:
    """The storage of an NZ cache that is declared as (P, page, Hkv, D), as ATB wants it."""
    blocks, page, heads, dim = pages.shape
    return pages.view(blocks, heads * dim // masks.NZ_BLOCK, page, masks.NZ_BLOCK)


def plain_pages(pages: Tensor) -> Tensor:
    """Pages stored as NZ, as (P, page, Hkv, D)."""
    return nz_view(pages).transpose(1, 2).reshape(pages.shape)


def _operator(call: AttentionCall, lens: Lengths, chip: Chip) -> str:
    bites = call.left is not None and call.left < max(lens.k) - 1
    if not call.page_size:
        return PREFILL_V3 if PREFILL_V3 in chip.operators else PREFILL
    if set(lens.q) == {1} and not bites:
        return DECODE
    return CHUNK_V2 if CHUNK_V2 in chip.operators and not bites else CHUNK


def _finish(call: AttentionCall, lens: Lengths, out: Tensor) -> Results:
    rows = out[: sum(lens.q)]
    past = call.q.shape[:-1].numel() // call.heads - rows.shape[0]  # rows of no sequence
    if past:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, past))
    return rows.view(*call.q.shape[:-1], call.v_head_dim), None
