"""Attention on tensors: picks tiles, launches the Triton kernels.

On NPU tensors the kernels compile through triton-ascend. On CPU tensors they run in Triton's interpreter, if
TRITON_INTERPRET=1 was set before Triton was imported: correct, slow, and what the tests use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chips import CHIPS, Chip
from .launch import kernel
from .planner import DecodeTiles, PrefillTiles, decode_tiles, edge_tiles, padded, prefill_tiles
from .tiling_mask import UNBOUNDED, tiling_mask

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
#: Rows of the packed matrix up to which a call counts as decoding, and queries that share one pass over keys.
DECODE_ROWS, DECODE_QUERIES = 64, 8
#: Rows that a vector core merges at a time.
COMBINE_ROWS = 16


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    q_pos0: Tensor | None = None,
    k_pos0: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    return_lse: bool = False,
    chip: Chip | None = None,
    tiles: PrefillTiles | DecodeTiles | None = None,
    cores: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``softmax(mask(softcap(scale * q @ k^T) + alibi + attn_mask), sinks) @ v``.

    Args:
        q: (B, Sq, H, D), or packed (total_q, H, D); float16 or bfloat16, D <= 256.
        k, v: (B, Sk, Hkv, D | Dv), packed (total_k, Hkv, ...) or pages (P, page, Hkv, ...), of q's dtype.
        causal, window: bottom-right aligned; key j is seen by query i iff
            ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``; causal makes right 0.
        alibi_slopes: float32 (H,) or (B, H). sinks: float32 (H,). k_scale, v_scale: float32 (Hkv,).
        attn_mask: bool (True: keep) or additive, (B, H, Sq, Sk) by strides; Sk counts slots.
        cu_seqlens_q, cu_seqlens_k, block_table, seqused_k, cache_batch_idx, cache_leftpad, q_pos0, k_pos0:
            int32; clamped to what they index.
        max_seqlen_q, max_seqlen_k: upper bounds for packed input.
        chip: None: that of q's device (the 910B3 on a CPU). tiles, cores: None: the planner's.

    Returns:
        out in q's dtype with Dv for D; lse float32 (B, H, Sq) or (H, total_q), empty unless asked for. A
        query without a visible key has output 0 and, without a sink, lse -inf.

    Raises:
        ValueError: for dtypes, a head_dim or a device that the kernels do not support. Shapes that do not
            belong together, and lengths beyond the tensors, are the caller's to refuse.
    """
    if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k, v: {q.dtype}, {k.dtype}, {v.dtype}; expected all float16 or all bfloat16")
    if not 1 <= min(q.shape[-1], v.shape[-1]) <= max(q.shape[-1], v.shape[-1]) <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim: {q.shape[-1]} and {v.shape[-1]}; expected 1 to {MAX_HEAD_DIM}")
    chip = chip or chip_of(q.device)
    cores = cores or chip.cube_cores
    left, right = window[0], 0 if causal else window[1]
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    seqlen_q = q.shape[1] if cu_seqlens_q is None else max_seqlen_q
    page = 0 if block_table is None else k.shape[1]
    group = q.shape[-2] // max(k.shape[-2], 1)
    if block_table is not None:
        capacity, rows_k = block_table.shape[1] * page, k.shape[0]
    elif cu_seqlens_k is not None:
        capacity, rows_k = max_seqlen_k, k.shape[0]
    else:
        capacity, rows_k = k.shape[1], k.shape[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = attn_mask.view(torch.int8)
    if attn_mask is not None:
        # Decoding counts from head to head of a group in int32.
        far = seqlen_q == 1 and group * attn_mask.stride(1) >= 1 << 31
        attn_mask = _rows(attn_mask) if far or attn_mask.stride(-1) != 1 else attn_mask
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, q.shape[-2])

    # Arguments that the two kernels share, by name.
    shared: dict[str, Any] = {
        "attn_mask": attn_mask,
        "alibi_slopes": slopes,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k,
        "cache_leftpad": cache_leftpad,
        "cache_batch_idx": cache_batch_idx,
        "q_pos0": q_pos0,
        "k_pos0": k_pos0,
        "block_table": block_table,
        "stride_kb": 0 if k.ndim == 3 else k.stride(0),
        "stride_ks": k.stride(-3),
        "stride_kh": k.stride(-2),
        "stride_vb": 0 if v.ndim == 3 else v.stride(0),
        "stride_vs": v.stride(-3),
        "stride_vh": v.stride(-2),
        "stride_mb": 0 if attn_mask is None else attn_mask.stride(0),
        "stride_mh": 0 if attn_mask is None else attn_mask.stride(1),
        "stride_ab": 0 if slopes is None else slopes.stride(0),
        "stride_table": 0 if block_table is None else block_table.stride(0),
        "scale": scale,
        "batch": batch,
        "capacity": capacity,
        "rows_k": rows_k,
        "page_size": page,
        "HEAD_DIM": q.shape[-1],
        "V_HEAD_DIM": v.shape[-1],
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_DV": padded(v.shape[-1]),
        "SOFTCAP": softcap,
    }
    few = 0 < seqlen_q <= DECODE_QUERIES and seqlen_q * group <= DECODE_ROWS
    whole = cu_seqlens_q is None or q.shape[0] == batch * seqlen_q
    if isinstance(tiles, DecodeTiles) or (
        tiles is None and few and whole and (attn_mask is None or seqlen_q == 1)
    ):
        biased = attn_mask is not None or slopes is not None
        tiles = tiles or decode_tiles(chip, q.shape[-1], v.shape[-1], seqlen_q * group, page, biased=biased)
        assert isinstance(tiles, DecodeTiles)
        if cu_seqlens_q is None:
            return _decode(q, k, v, (left, right), sinks, shared, tiles, cores, return_lse=return_lse)
        # That the rows would fit does not say that each sequence has seqlen_q of them: the end of the tensor
        # may belong to none. Sequences with fewer queries get spare ones before their first.
        total = q.shape[0]
        ends = cu_seqlens_q.clamp(0, total).long()
        tokens = ends[1:, None] + torch.arange(-seqlen_q, 0, device=q.device)
        if q_pos0 is not None:
            shared["q_pos0"] = (q_pos0 - seqlen_q + ends.diff()).int()
        dense = q[tokens.clamp(0, total - 1)]
        tokens = torch.where(tokens >= ends[:-1, None], tokens, total).flatten()
        out, lse = _decode(dense, k, v, (left, right), sinks, shared, tiles, cores, return_lse=return_lse)
        out = _placed(out.flatten(0, 1), tokens, total, 0.0)
        if return_lse:
            lse = _placed(lse.transpose(1, 2).flatten(0, 1), tokens, total, -torch.inf).t().contiguous()
        return out, lse
    tiles = tiles or prefill_tiles(
        chip,
        q.shape[-1],
        v.shape[-1],
        page,
        edge=edge_tiles(
            band=not (left is None and right is None),
            mask_bytes=0 if attn_mask is None else attn_mask.element_size(),
            alibi=slopes is not None,
            softcap=softcap > 0,
        ),
        biased=attn_mask is not None or slopes is not None,
        softcap=softcap > 0,
    )
    assert isinstance(tiles, PrefillTiles)
    spans = (cu_seqlens_q, seqlen_q)
    return _prefill(q, k, v, (left, right), sinks, spans, shared, tiles, cores, return_lse=return_lse)


def _prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[int | None, int | None],
    sinks: Tensor | None,
    spans: tuple[Tensor | None, int],
    shared: dict[str, Any],
    tiles: PrefillTiles,
    cores: int,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    cu_seqlens_q, seqlen_q = spans
    heads = q.shape[-2]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse_shape = (heads, q.shape[0]) if q.ndim == 3 else (q.shape[0], heads, q.shape[1])
    lse = q.new_empty(lse_shape if return_lse else (0,), dtype=torch.float32)
    if cu_seqlens_q is not None:  # rows past the last sequence
        out.zero_()
        lse.fill_(-torch.inf)
    band = None if bounds == (None, None) else tiling_mask(tiles.block_q, tiles.edge_k, *bounds, q.device)
    work = -(-seqlen_q // tiles.block_q) * shared["batch"] * heads
    if work == 0:
        return out, lse
    attn_mask = shared["attn_mask"]
    kernel("prefill:prefill_kernel", q.device)[(min(cores, work),)](
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse if return_lse else None,
        band=None if band is None else band.matrix,
        sinks=sinks,
        cu_seqlens_q=cu_seqlens_q,
        stride_qb=0 if q.ndim == 3 else q.stride(0),
        stride_qs=q.stride(-3),
        stride_qh=q.stride(-2),
        stride_ob=0 if q.ndim == 3 else out.stride(0),
        stride_os=out.stride(-3),
        stride_oh=out.stride(-2),
        stride_lb=0 if q.ndim == 3 else heads * q.shape[1],
        stride_lh=q.shape[-3],
        stride_mq=0 if attn_mask is None else attn_mask.stride(2),
        heads=heads,
        group=heads // k.shape[-2],
        seqlen_q=seqlen_q,
        total_q=q.shape[0],
        left=UNBOUNDED if band is None else band.left,
        right=UNBOUNDED if band is None else band.right,
        band_stride=0 if band is None else band.matrix.stride(0),
        band_origin=0 if band is None else band.origin,
        band_skip=0 if band is None else band.skip,
        BLOCK_Q=tiles.block_q,
        BLOCK_K=tiles.block_k,
        EDGE_K=tiles.edge_k,
        **shared,
    )
    return out, lse


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: tuple[int | None, int | None],
    sinks: Tensor | None,
    shared: dict[str, Any],
    tiles: DecodeTiles,
    cores: int,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    batch, kv_heads, v_dim = shared["batch"], k.shape[-2], v.shape[-1]
    queries, heads = q.shape[1:3]
    group = heads // kv_heads
    count = queries * group
    # (B, Hkv, rows, D): a view for one query, a copy of a few rows otherwise.
    rows = q.reshape(batch, queries, kv_heads, group, -1).transpose(1, 2).reshape(batch, kv_heads, count, -1)
    blocks = -(-shared["capacity"] // tiles.block_k)
    splits = max(1, min(cores // max(batch * kv_heads, 1), blocks))
    out = q.new_empty((batch, kv_heads, queries, group, v_dim))
    lse = q.new_empty((batch, kv_heads, queries, group), dtype=torch.float32)
    part = q.new_empty((batch, kv_heads, splits, count, v_dim), dtype=torch.float32)
    part_lse = q.new_empty((batch, kv_heads, splits, count), dtype=torch.float32)
    left, right = (UNBOUNDED if n is None else min(n, UNBOUNDED) for n in bounds)
    if batch:
        kernel("decode:decode_kernel", q.device)[(min(cores, batch * kv_heads * splits),)](
            q=rows,
            k=k,
            v=v,
            part=part,
            part_lse=part_lse,
            stride_qb=rows.stride(0),
            stride_qh=rows.stride(1),
            stride_qr=rows.stride(2),
            kv_heads=kv_heads,
            splits=splits,
            left=left,
            right=right,
            QUERIES=queries,
            GROUP=group,
            BLOCK_R=tiles.block_r,
            BLOCK_K=tiles.block_k,
            **shared,
        )
        kernel("decode:combine_kernel", q.device)[
            (min(2 * cores, batch * kv_heads * -(-count // COMBINE_ROWS)),)
        ](
            part,
            part_lse,
            out,
            lse if return_lse else None,
            sinks,
            batch * kv_heads,
            kv_heads,
            splits,
            V_HEAD_DIM=v_dim,
            BLOCK_DV=padded(v_dim),
            QUERIES=queries,
            GROUP=group,
            BLOCK_R=COMBINE_ROWS,
        )
    out = out.transpose(1, 2).reshape(*q.shape[:-1], v_dim)
    if not return_lse:
        return out, lse.new_empty((0,))
    return out, lse.permute(0, 1, 3, 2).reshape(batch, heads, queries)


def _placed(values: Tensor, rows: Tensor, total: int, rest: float) -> Tensor:
    """(total, ...) of ``values`` (N, ...) at ``rows``, those at ``total`` dropped; ``rest`` elsewhere."""
    return values.new_full((total + 1, *values.shape[1:]), rest).index_copy_(0, rows, values)[:total]


def chip_of(device: torch.device) -> Chip:
    """The chip of an NPU; the 910B3 for a CPU, whose interpreter has no limits of its own.

    Raises ValueError for an NPU that the kernels are not compiled for (310P, 910A).
    """
    if device.type == "cpu":
        return CHIPS["Ascend910B3"]
    name = getattr(torch, device.type).get_device_name(device)
    chip = CHIPS.get(name)
    if chip is None:
        raise ValueError(f"device: the kernels support {', '.join(CHIPS)}, got {name!r}")
    return chip


def _rows(mask: Tensor) -> Tensor:
    """The mask with consecutive keys; what was broadcast over batch, heads or queries stays one row."""
    small = mask
    for dim in range(3):
        small = small.narrow(dim, 0, 1) if mask.stride(dim) == 0 and mask.shape[dim] else small
    return small.contiguous().expand(mask.shape)
