"""torch's own operators: what any torch device can do without kernels of ours.

`scaled_dot_product_attention` has no GQA that is fast on every device, no variable length and no pages,
so sequences are gathered, query heads of a KV group are folded into rows where that is cheap, and what
it cannot express becomes an additive mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indices import check_indices
from ..spec import AttentionArgs, AttentionSignature, Backend, Op

_FEATURES = frozenset(
    {
        "causal",
        "window",
        "alibi_slopes",
        "attn_mask",
        "cu_seqlens_q",
        "cu_seqlens_k",
        "block_table",
        "seqused_k",
        "cache_batch_idx",
        "cache_leftpad",
        "q_pos0",
        "k_pos0",
    }
)


def attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    """(out, empty lse); sequences of unequal length run one after another.

    Raises ValueError for an index out of range on a CPU; elsewhere torch's own indexing does.
    """
    if a.q.device.type == "cpu":
        check_indices(a)
    ragged = ("cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k", "cache_leftpad", "cache_batch_idx")
    if any(getattr(a, name) is not None for name in ragged):
        out = _by_sequence(a)
    else:
        out = _dense(a, a.q, a.k, a.v, _positions(a, slice(None), a.q.shape[1], a.k.shape[1]), a.attn_mask)
    return out, a.q.new_empty((0,), dtype=torch.float32)


def _by_sequence(a: AttentionArgs) -> Tensor:
    batch = a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.numel() - 1
    cu_q = None if a.cu_seqlens_q is None else a.cu_seqlens_q.tolist()
    out = a.q.new_zeros((*a.q.shape[:-1], a.v.shape[-1]))
    for b in range(batch):
        rows = slice(b, b + 1) if cu_q is None else slice(cu_q[b], cu_q[b + 1])
        q = a.q[rows] if cu_q is None else a.q[rows].unsqueeze(0)
        lo, hi, k, v = _gather(a, b)
        mask = None if a.attn_mask is None else a.attn_mask[b : b + 1, :, :, lo:hi]
        positions = _positions(a, slice(b, b + 1), q.shape[1], hi - lo)
        out[rows] = _dense(a, q, k, v, positions, mask, b).view(out[rows].shape)
    return out


def _gather(a: AttentionArgs, b: int) -> tuple[int, int, Tensor, Tensor]:
    """Bounds and values of sequence ``b``'s keys: (1, Sk, Hkv, D)."""
    lo = 0 if a.cache_leftpad is None else int(a.cache_leftpad[b])
    k, v = a.k, a.v
    if a.block_table is not None:
        assert a.seqused_k is not None
        pages = a.block_table[b, : -(-int(a.seqused_k[b]) // k.shape[1])].long()
        k, v = k[pages].flatten(0, 1), v[pages].flatten(0, 1)
    elif a.cu_seqlens_k is not None:
        start, stop = a.cu_seqlens_k[b : b + 2].tolist()
        k, v = k[start:stop], v[start:stop]
    else:
        row = b if a.cache_batch_idx is None else int(a.cache_batch_idx[b])
        k, v = k[row], v[row]
    hi = k.shape[0] if a.seqused_k is None else int(a.seqused_k[b])
    lo = min(lo, hi)
    return lo, hi, k[lo:hi].unsqueeze(0), v[lo:hi].unsqueeze(0)


def _positions(a: AttentionArgs, rows: slice, q_len: int, k_len: int) -> tuple[Tensor, Tensor]:
    """Positions of queries (B | 1, Sq, 1) and keys (B | 1, 1, Sk)."""
    zero = torch.zeros(1, dtype=torch.int64, device=a.q.device)
    k_start = zero if a.k_pos0 is None else a.k_pos0[rows].long()
    q_start = k_start + (k_len - q_len) if a.q_pos0 is None else a.q_pos0[rows].long()
    i = torch.arange(q_len, device=a.q.device)
    j = torch.arange(k_len, device=a.q.device)
    return (q_start[:, None] + i)[:, :, None], (k_start[:, None] + j)[:, None, :]


def _dense(
    a: AttentionArgs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    sequence: int | None = None,
) -> Tensor:
    """SDPA of (B, Sq, H, D) against (B, Sk, Hkv, D); rows without a visible key are zeroed."""
    batch, q_len, heads, _ = q.shape
    k_len, kv_heads = k.shape[1:3]
    if 0 in (batch, q_len, k_len, heads):
        return q.new_zeros((*q.shape[:-1], v.shape[-1]))
    bias = _bias(a, positions, mask, q.dtype, sequence)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    group = heads // kv_heads
    if bias is None or bias.shape[1] == 1:
        # One bias serves all heads, so the heads of a KV group become rows of one matrix: each KV head
        # is read once, several times faster than enable_gqa on CPUs, and K and V are not repeated.
        folded = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        rows = None if bias is None else bias.repeat(1, 1, group, 1)
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=rows, scale=a.scale)
        out = out.unflatten(2, (group, q_len)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    else:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=bias, scale=a.scale)
        out = out.transpose(1, 2)
    if bias is not None:
        unseen = (bias == -torch.inf).all(-1).transpose(1, 2)
        out = out.masked_fill(unseen[..., None], 0.0)
    return out.contiguous()


def _bias(
    a: AttentionArgs,
    positions: tuple[Tensor, Tensor],
    mask: Tensor | None,
    dtype: torch.dtype,
    sequence: int | None,
) -> Tensor | None:
    """Additive (B | 1, H | 1, Sq, Sk), -inf where hidden; None when nothing restricts or biases."""
    q_pos, k_pos = (t[:, None] for t in positions)
    left, right = a.bounds()
    if left is None and right is None and mask is None and a.alibi_slopes is None:
        return None
    hidden = torch.zeros_like(q_pos + k_pos, dtype=torch.bool)
    if left is not None:
        hidden = hidden | (k_pos < q_pos - left)
    if right is not None:
        hidden = hidden | (k_pos > q_pos + right)
    bias = torch.zeros(1, dtype=dtype, device=a.q.device).expand(hidden.shape)
    if a.alibi_slopes is not None:
        slopes = a.alibi_slopes
        if slopes.ndim == 2 and sequence is not None:
            slopes = slopes[sequence]
        bias = (-slopes.reshape(-1, a.q.shape[-2], 1, 1) * (q_pos - k_pos).abs()).to(dtype)
    if mask is not None:
        # A mask that was broadcast over heads or queries is still one mask in memory.
        for dim in (1, 0):
            mask = mask.narrow(dim, 0, 1) if mask.shape[dim] > 1 and mask.stride(dim) == 0 else mask
        if mask.dtype == torch.bool:
            hidden = hidden | ~mask
        else:
            bias = bias + mask.to(dtype)
    return bias.masked_fill(hidden, -torch.inf)


def _reasons(signature: AttentionSignature) -> list[str]:
    return [] if signature.kv_layout == "nhd" else [f"kv_layout {signature.kv_layout!r}"]


def _ops() -> Mapping[str, Op]:
    from .torch_ops import OPS

    return {"attention": Op(attention, _FEATURES, _reasons), **OPS}


BACKEND = Backend(
    name="sdpa",
    device_types=("cpu", "cuda", "npu", "mps", "xpu"),
    available=list,
    ops=_ops,
    describe=lambda: {"torch": torch.__version__},
)
