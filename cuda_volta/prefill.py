"""Attention of many queries: FlashAttention's forward pass on tensor cores."""

from __future__ import annotations

from torch import Tensor

from .attention_params import AttentionCall, aligned, attention_params, new_results
from .runtime import load
from .variant import Variant

BLOCK_Q = 128
BLOCK_K = 32
#: Steps of Q K^T whose Q stays in registers, for each head_dim: as many as leave room for the rest.
HELD = {32: 4, 64: 8, 96: 3, 128: 0, 160: 6, 192: 4, 256: 0}
HEAD_DIMS = tuple(HELD)
#: What variants know beside bounds, lengths and pages; ANYTHING: all of it, masks and any layout, more slowly.
FEATURES = PLAIN, SOFTCAP, ALIBI, ANYTHING = tuple(range(4))


def _variant(head_dim: int, features: int) -> Variant:
    wide = head_dim > 128 or features == ANYTHING
    held = 0 if features == ANYTHING else HELD[head_dim]
    kv_bytes = BLOCK_K * -(-2 * head_dim // 128) * 128
    q_bytes = BLOCK_Q * 2 * (head_dim - held * (16 if wide else 8))
    return Variant(
        op="prefill",
        source="prefill.cu",
        entry="prefill",
        defines=(("HEAD_DIM", head_dim), ("FEATURES", features), ("HELD", held)),
        threads=256 if wide else 128,
        min_blocks=1 if wide else 2,
        shared_bytes=2 * kv_bytes + q_bytes,
        head_dim=head_dim,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
    )


PREFILL = {(d, f): _variant(d, f) for d in HEAD_DIMS for f in FEATURES}
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
    head_dim, v_head_dim = call.q.shape[-1], call.v.shape[-1]
    width = next(d for d in HEAD_DIMS if d >= max(head_dim, v_head_dim))
    irregular = not aligned(call) or v_head_dim > head_dim or (call.block_table is not None and not page_rows)
    both = bool(call.softcap) and call.alibi_slopes is not None
    if irregular or both or call.attn_mask is not None:
        return PREFILL[width, ANYTHING]
    if call.softcap:
        return PREFILL[width, SOFTCAP]
    return PREFILL[width, PLAIN if call.alibi_slopes is None else ALIBI]
