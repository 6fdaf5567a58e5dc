"""Attention of few queries over long caches: split KV, query heads packed into tensor-core rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .attention_params import AttentionCall, aligned, attention_params, new_results
from .runtime import load, processors
from .variant import Variant

ROWS = 16  # packed rows of a block
WARPS = 8
_BAND_BYTES = ROWS * 8
_MERGE_BYTES = WARPS * ROWS * (8 + 72 * 4)  # decode_merge.cuh
# A split reads its queries and has its part of the result written and read in float32: 2 D + 8 Dv bytes a row
# against the 2 D + 2 Dv of a key, and a little more whatever its rows. So many keys keep that below 1.6 %.
_KEYS_A_SPLIT, _KEYS_A_ROW = 128, 176


def _variant(head_dim: int, block_k: int, vector: int = 1) -> Variant:
    return Variant(
        op="decode",
        source="decode.cu",
        entry="decode",
        defines=(("HEAD_DIM", head_dim), ("BLOCK_K", block_k), ("VECTOR", vector)),
        threads=32 * WARPS,
        min_blocks=1,
        shared_bytes=ROWS * head_dim * 2 + _BAND_BYTES + _MERGE_BYTES,
        head_dim=head_dim,
        block_q=ROWS,
        block_k=block_k,
    )


#: By the head dims they hold; a warp's tile of keys and values is 32 to 64 registers in flight.
DECODE = {d: _variant(d, 32 if d <= 64 else 16 if d <= 128 else 8) for d in (32, 64, 96, 128, 160, 192, 256)}
#: Any head_dim, stride and address, element by element.
UNALIGNED = _variant(256, 8, vector=0)
COMBINE = Variant("combine", "combine.cu", "combine", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (*DECODE.values(), UNALIGNED, COMBINE)


def decode(call: AttentionCall, splits: int | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of an attention call with few queries; correct for any number of them.

    ``splits``: ranges of keys that are computed apart and merged; None: as many as the machine needs.
    Returns (B, Sq, H, Dv) or (total_q, H, Dv) in float16, and float32 (B, H, Sq) or (H, total_q), natural
    log, empty unless asked for. Reads no value of a tensor on the host: the grid follows from shapes and
    the caller's bounds. Raises ValueError for what the kernels cannot take.
    """
    out, lse = new_results(call)
    p = attention_params(call, out, lse)
    if not out.numel() or not p.max_seqlen_q:
        return out, lse
    units = p.batch * p.kv_heads * -(-p.max_seqlen_q * (p.heads // p.kv_heads) // ROWS)
    rows = min(ROWS, p.max_seqlen_q * (p.heads // p.kv_heads))
    p.splits = splits or num_splits(units, call.longest_k, rows, processors(call.q.device))
    device = call.q.device
    kernel = load(_choose(call), device)
    if p.splits == 1:
        kernel.launch((units, 1, 1), p, reads=call.tensors(), writes=(out, lse))
        return out, lse
    p.partial_width = -(-p.v_head_dim // 4) * 4
    partial_lse = out.new_empty((*out.shape[:-1], p.splits), dtype=torch.float32)
    partial_out = out.new_empty((*out.shape[:-1], p.splits, p.partial_width), dtype=torch.float32)
    p.partial_out, p.partial_lse = partial_out.data_ptr(), partial_lse.data_ptr()
    kernel.launch((units, p.splits, 1), p, reads=call.tensors(), writes=(partial_out, partial_lse))
    total = p.batch * p.heads * p.max_seqlen_q
    reads = (*call.tensors(), partial_out, partial_lse)
    load(COMBINE, device).launch((-(-total // WARPS), 1, 1), p, reads=reads, writes=(out, lse))
    return out, lse


@lru_cache(maxsize=4096)
def num_splits(units: int, keys: int, rows: int, sms: int) -> int:
    """Into how many ranges of keys each of ``units`` blocks of ``rows`` packed rows is cut.

    The fewest whose blocks fill the machine's waves at least 95 % as well as the best choice does (after
    FlashAttention's rule), each range long enough to outweigh its partial result.
    """
    most = max(1, min(keys // (_KEYS_A_SPLIT + _KEYS_A_ROW * rows), sms))

    def filled(splits: int) -> float:
        waves = units * splits / sms
        return waves / -(-units * splits // sms)

    best = max(map(filled, range(1, most + 1)))
    return next(n for n in range(1, most + 1) if filled(n) >= 0.95 * best)


def _choose(call: AttentionCall) -> Variant:
    if not aligned(call):
        return UNALIGNED
    widest = max(call.q.shape[-1], call.v.shape[-1])
    return next(variant for head_dim, variant in DECODE.items() if head_dim >= widest)
