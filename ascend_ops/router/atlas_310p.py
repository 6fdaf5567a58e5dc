"""310P ("Atlas inference"): the attention operators of ATB, with a KV cache in NZ.

A page of an NZ cache is stored as (Hkv * D / 16, page, 16). Limits are those of SelfAttentionOperation and
PagedAttentionOperation in CANN's documents. The mask of a prefill is as large as its scores here: only some
releases of CANN have a compressed one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import masks
from .call import AttentionCall, Lengths
from .chips import Chip
from .invocation import Invocation, Results

PREFILL, DECODE, CHUNK = "_npu_flash_attention", "_npu_paged_attention", "_npu_paged_attention_splitfuse"
LONGEST_MASK = 16384  # queries and keys: a mask of 512 MiB
_NEVER = (
    "softcap", "alibi_slopes", "sinks", "attn_mask", "cache_batch_idx", "cache_leftpad", "q_pos0", "k_pos0",
    "k_scale", "v_scale",
)  # fmt: skip


def static_reasons(call: AttentionCall, chip: Chip) -> list[str]:
    """Against the call, whatever its lengths."""
    if PREFILL not in chip.operators:
        return chip.lacks(PREFILL)
    d, dv = call.head_dim, call.v_head_dim
    out = [f"{n}: not an argument of ATB's attention" for n in call.given(_NEVER)]
    if call.return_lse:
        out.append("return_lse: ATB's attention has none")
    if call.q.dtype != torch.float16 or call.k.dtype != torch.float16:
        out.append(f"dtype: {call.q.dtype} and {call.k.dtype}, 310P takes float16")
    if d != dv or d % 16 or d > 256:
        out.append(f"head_dim: {d} and {dv} of v, one multiple of 16 up to 256")
    if call.right != 0:
        out.append("causal: ATB's operators on 310P are causal")
    if call.page_size:
        if call.kv_layout != "npu_nz":
            out.append("kv_layout: pages on 310P are NZ (kv_layout='npu_nz')")
        if call.page_size % 16 or call.page_size * d > 128 * 128:
            out.append(f"page size: {call.page_size}, a multiple of 16, with head_dim at most 16384")
    else:
        if call.kv_layout != "nhd":
            out.append("kv_layout: keys that are not paged are nhd")
        if call.seqused_k is not None:
            out.append("cache_seqlens: a cache must be paged")
        if call.left is not None:
            out.append("window: ATB's prefill on 310P has none")
        if (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None):
            out.append("cu_seqlens: both of q and k, or neither")
    return out


def reasons(call: AttentionCall, lens: Lengths) -> list[str]:
    """Against the call with these lengths."""
    out = []
    if len(lens.q) > 2000:
        out.append(f"batch: {len(lens.q)}, at most 2000")
    if not call.page_size and lens.q != lens.k:
        out.append("k: other lengths than q; ATB's prefill on 310P needs them equal")
    if not _decodes(call, lens) and max(lens.k) > LONGEST_MASK:
        out.append(f"k: {max(lens.k)} keys, the mask of a prefill is held for at most {LONGEST_MASK}")
    if call.page_size and any(sq > sk for sq, sk in zip(lens.q, lens.k, strict=True)):
        out.append("q: more queries than keys")
    return out


def invocation(call: AttentionCall, lens: Lengths) -> Invocation:
    """The exact call; assumes that there are no reasons against it."""
    q = (call.q.flatten(0, 1) if call.q.ndim == 4 else call.q[: sum(lens.q)]).contiguous()
    common: dict[str, Any] = {
        "scale_value": call.scale, "num_heads": call.heads, "num_kv_heads": call.kv_heads,
    }  # fmt: skip
    if not call.page_size:
        return _prefill(call, lens, q, common)
    cached = {"key_cache": nz_view(call.k), "value_cache": nz_view(call.v), "block_table": call.block_table}
    common |= cached | {"query": q, "context_lens": call.seqused_k, "out": torch.empty_like(q)}
    if _decodes(call, lens):
        return Invocation("atb", DECODE, (), common, _finish(call, lens, common["out"]))
    device = q.device
    ends = torch.tensor(lens.k, device=device)
    counts = torch.tensor(lens.q, device=device)
    first = (ends - counts).repeat_interleave(counts)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    positions = first + torch.arange(q.shape[0], device=device) - starts
    mask = masks.to_nz(masks.additive_rows(positions, max(lens.k), call.left))
    common |= {"mask": mask, "seq_len": torch.tensor(lens.q, dtype=torch.int32)}
    return Invocation("atb", CHUNK, (), common, _finish(call, lens, common["out"]))


def _prefill(call: AttentionCall, lens: Lengths, q: Tensor, common: dict[str, Any]) -> Invocation:
    """Rows are padded to a multiple of 16, which lengthens the last sequence: causal, so none sees more."""
    rows = q.shape[0]
    padding = -rows % 16
    k, v = (t.flatten(0, 1) if t.ndim == 4 else t[: sum(lens.k)] for t in (call.k, call.v))
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, padding)).contiguous() for t in (q, k, v))
    seqlens = (*lens.q[:-1], lens.q[-1] + padding)
    longest = max(seqlens)
    positions = torch.arange(longest, device=q.device)
    common |= {
        "query": q, "key": k, "value": v, "out": torch.empty_like(q),
        "mask": masks.to_nz(masks.additive_rows(positions, longest, None)),
        "seq_len": torch.tensor(seqlens, dtype=torch.int32),
    }  # fmt: skip
    return Invocation("atb", PREFILL, (), common, _finish(call, lens, common["out"]))


def _finish(call: AttentionCall, lens: Lengths, out: Tensor) -> Any:
    def finish(_: None) -> Results:
        rows = out[: sum(lens.q)]
        past = call.q.shape[:-1].numel() // call.heads - rows.shape[0]  # rows of no sequence
        if past:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, past))
        return rows.view(*call.q.shape[:-1], call.v_head_dim), None

    return finish


def nz_view(pages: Tensor) -> Tensor:
    """The storage of an NZ cache that is declared as (P, page, Hkv, D), as ATB wants it."""
    blocks, page, heads, dim = pages.shape
    return pages.view(blocks, heads * dim // masks.NZ_BLOCK, page, masks.NZ_BLOCK)


def _decodes(call: AttentionCall, lens: Lengths) -> bool:
    one_each = bool(call.page_size) and set(lens.q) == {1}
    return one_each and (call.left is None or call.left >= max(lens.k) - 1)
