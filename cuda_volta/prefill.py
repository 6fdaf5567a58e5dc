"""Attention of many queries: FlashAttention's forward pass on tensor cores."""

from __future__ import annotations

from torch import Tensor

from .attention_params import AttentionCall, aligned, attention_params, new_results
from .runtime import load
from .variant import Variant

BLOCK_Q = 128
BLOCK_K = 32
#: Q's share of 16-byte columns that stays in registers, of HELD in prefill_layout.cuh.
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256)
#: What variants know beside bounds and lengths: nothing; softcap and ALiBi; masks and any layout as well.
PLAIN, SOFTCAP, ALIBI, ANYTHING = range(4)


def _variant(head_dim: int, features: int) -> Variant:
    wide = head_dim > 128
    kv_bytes = BLOCK_K * -(-2 * head_dim // 128) * 128
    return Variant(
        op="prefill",
        source="prefill.cu",
        entry="prefill",
        defines=(("HEAD_DIM", head_dim), ("FEATURES", features)),
        threads=256 if wide else 128,
        min_blocks=1 if wide else 2,
        shared_bytes=2 * kv_bytes + (0 if head_dim <= 64 else BLOCK_Q * 2 * head_dim),
        head_dim=head_dim,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
    )


PREFILL = {(d, f): _variant(d, f) for d in HEAD_DIMS for f in range(4)}
VARIANTS = tuple(PREFILL.values())


def prefill(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention call; meant for many queries, correct for any number of them.

    Returns (B, Sq, H, Dv) or (total_q, H, Dv) in float16, and float32 (B, H, Sq) or (H, total_q), natural
    log, empty unless asked for. Reads no value of a tensor on the host: the grid follows from shapes and
    the caller's bounds. Raises ValueError for what the kernels cannot take.
    """
    out, lse = new_results(call)
    p = attention_params(call, out, lse)
    blocks = -(-p.max_seqlen_q // BLOCK_Q)
    if not out.numel() or not blocks:
        return out, lse
    variant = choose(call, p.page_rows)
    grid = (blocks, p.heads, p.batch)
    load(variant, call.q.device).launch(grid, p, reads=call.tensors(), writes=(out, lse))
    return out, lse


def choose(call: AttentionCall, page_rows: int) -> Variant:
    """The least variant that can run the call."""
    width = max(call.q.shape[-1], call.v.shape[-1])
    head_dim = next(d for d in HEAD_DIMS if d >= width)
    exact = call.q.shape[-1] == call.v.shape[-1] == head_dim and aligned(call)
    if not exact or call.attn_mask is not None or (call.block_table is not None and not page_rows):
        return PREFILL[head_dim, ANYTHING]
    return PREFILL[head_dim, SCORES if call.softcap or call.alibi_slopes is not None else PLAIN]
