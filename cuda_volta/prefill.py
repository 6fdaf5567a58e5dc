"""Attention of many queries: FlashAttention's forward pass on tensor cores."""

from __future__ import annotations

from torch import Tensor

from .attention_params import GRID_LIMIT, AttentionCall, aligned, attention_params, new_results
from .runtime import load
from .tilings import TILINGS, Tiling
from .tune import best
from .variant import Variant

BLOCK_Q = 128
BLOCK_K = 32


#: Smaller ones run in the next larger one's kernels, padded.
HEAD_DIMS = tuple(sorted({head_dim for head_dim, _ in TILINGS}))
#: What variants know beside bounds, lengths and pages. ANYTHING knows all of it, masks and any layout, and is
#: slower.
FEATURES = PLAIN, SOFTCAP, ALIBI, ANYTHING = tuple(range(4))
#: Scores of the SOFTCAP variants are softcap times what has an error of 2^-22.
_SOFTCAP_LIMIT = 1024.0
_ROW_STRIDE_LIMIT = 1 << 31  # elements: the other variants count a row's bytes in 32 bits


#: Of ANYTHING: its speed follows from its rules for scores, not from how its loop is cut.
_ROLLED = Tiling(0, 1, 1, 1)


def variant(head_dim: int, features: int, tiling: Tiling) -> Variant:
    """The kernel for a head_dim whose loop is cut as ``tiling`` says."""
    wide = head_dim > 128 or features == ANYTHING
    kv_bytes = BLOCK_K * -(-2 * head_dim // 128) * 128
    q_bytes = BLOCK_Q * 2 * (head_dim - tiling.held * (16 if wide else 8))
    macros = tuple((name.upper(), value) for name, value in tiling._asdict().items())
    return Variant(
        op="prefill",
        source="prefill.cu",
        entry="prefill",
        defines=(("HEAD_DIM", head_dim), ("FEATURES", features), *macros),
        threads=256 if wide else 128,
        min_blocks=tiling.blocks,
        shared_bytes=2 * kv_bytes + q_bytes,
        head_dim=head_dim,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
    )


PREFILL = {(d, f): variant(d, f, TILINGS.get((d, f), _ROLLED)) for d in HEAD_DIMS for f in FEATURES}
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
    device = call.q.device

    def launch(variant: Variant) -> None:
        kernel = load(variant, device)
        for first in range(0, p.batch, GRID_LIMIT):
            p.first_batch = first
            grid = (blocks, p.heads, min(p.batch - first, GRID_LIMIT))
            kernel.launch(grid, p, reads=call.tensors(), writes=(out, lse))

    launch(best(kind(call), candidates(call, p.page_rows), launch, device))
    return out, lse


def candidates(call: AttentionCall, page_rows: int) -> tuple[Variant, ...]:
    """The variants that can run the call and may be the fastest, the model's choice first."""
    first = choose(call, page_rows)
    last = PREFILL[first.head_dim, ANYTHING]
    return (first,) if first is last else (first, last)


def kind(call: AttentionCall) -> str:
    """What decides which candidate is the fastest: features, head dims, and the sizes to a factor of two."""
    sizes = (call.batch * call.q.shape[-2], call.longest_q, call.longest_k)
    flags = (call.causal, call.window != (None, None), call.block_table is not None)
    return f"prefill {call.q.shape[-1]} {call.v.shape[-1]} {flags} {[n.bit_length() for n in sizes]}"


def choose(call: AttentionCall, page_rows: int) -> Variant:
    """The least variant that can run the call."""
    head_dim, v_head_dim = call.q.shape[-1], call.v.shape[-1]
    width = next(d for d in HEAD_DIMS if d >= max(head_dim, v_head_dim))
    irregular = not aligned(call) or v_head_dim > head_dim or (call.block_table is not None and not page_rows)
    irregular |= max(call.k.stride(-3), call.v.stride(-3)) >= _ROW_STRIDE_LIMIT
    both = bool(call.softcap) and call.alibi_slopes is not None
    if irregular or both or call.attn_mask is not None or call.softcap > _SOFTCAP_LIMIT:
        return PREFILL[width, ANYTHING]
    if call.softcap:
        return PREFILL[width, SOFTCAP]
    return PREFILL[width, PLAIN if call.alibi_slopes is None else ALIBI]
