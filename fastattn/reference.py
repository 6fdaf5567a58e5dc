"""The float64 oracle of attention: readable maths, sequence by sequence.

Every backend is tested against it, and ``backend="reference"`` runs it. The other ops' oracles are in
`reference_ops`.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from .spec import AttentionArgs


def attention(a: AttentionArgs, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """(out, lse): (B, Sq, H, Dv) and (B, H, Sq), or packed (total_q, H, Dv) and (H, total_q).

    In float64, or in another ``dtype`` with each intermediate rounded: the yardstick of the accuracy rule.
    """
    batch = a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.numel() - 1
    out = a.q.new_zeros((*a.q.shape[:-1], a.v.shape[-1]), dtype=dtype)
    lse = a.q.new_full(a.q.shape[:-1], -torch.inf, dtype=dtype)
    for b in range(batch):
        rows = b if a.cu_seqlens_q is None else slice(*a.cu_seqlens_q[b : b + 2].tolist())
        k, v = (t.to(dtype) for t in sequence_kv(a, b))
        scores = _scores(a, b, a.q[rows].to(dtype), k)
        out[rows], lse[rows] = _softmax_v(scores, v, a.sinks)
    return out, lse.transpose(-1, -2).contiguous()


def sequence_kv(a: AttentionArgs, b: int) -> tuple[Tensor, Tensor]:
    """The valid keys and values of sequence ``b``, float64 (Sk, Hkv, D), read through every indirection."""
    row = b if a.cache_batch_idx is None else int(a.cache_batch_idx[b])
    lo = 0 if a.cache_leftpad is None else int(a.cache_leftpad[b])

    def read(cache: Tensor, scale: Tensor | None) -> Tensor:
        if a.block_table is not None:
            used = int(a.seqused_k[b]) if a.seqused_k is not None else 0
            pages = a.block_table[b, : -(-used // cache.shape[1])].long()
            keys = cache[pages].flatten(0, 1)
        elif a.cu_seqlens_k is not None:
            keys = cache[slice(*a.cu_seqlens_k[b : b + 2].tolist())]
        else:
            keys = cache[row]
        hi = keys.shape[0] if a.seqused_k is None else int(a.seqused_k[b])
        keys = keys[lo:hi].double()
        return keys if scale is None else keys * scale.double()[:, None]

    return read(a.k, a.k_scale), read(a.v, a.v_scale)


def _scores(a: AttentionArgs, b: int, q: Tensor, k: Tensor) -> Tensor:
    """Scaled, capped, biased and masked scores (Hkv, G, Sq, Sk); hidden keys are -inf."""
    kv_heads = k.shape[1]
    q = rearrange(q, "i (kv g) d -> i kv g d", kv=kv_heads)
    s = einsum(q, k, "i kv g d, j kv d -> kv g i j") * a.scale
    if a.softcap:
        s = a.softcap * torch.tanh(s / a.softcap)

    q_len, k_len = s.shape[-2:]
    k_start = 0 if a.k_pos0 is None else int(a.k_pos0[b])
    q_start = k_start + k_len - q_len if a.q_pos0 is None else int(a.q_pos0[b])
    q_pos = torch.arange(q_start, q_start + q_len, device=q.device)[:, None]
    k_pos = torch.arange(k_start, k_start + k_len, device=q.device)[None, :]
    if a.alibi_slopes is not None:
        slopes = a.alibi_slopes if a.alibi_slopes.ndim == 1 else a.alibi_slopes[b]
        slopes = rearrange(slopes.to(s.dtype), "(kv g) -> kv g 1 1", kv=kv_heads)
        s = s - slopes * (q_pos - k_pos).abs()
    if a.attn_mask is not None:
        lo = 0 if a.cache_leftpad is None else int(a.cache_leftpad[b])
        mask = rearrange(a.attn_mask[b, :, :, lo : lo + k_len], "(kv g) i j -> kv g i j", kv=kv_heads)
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
    left, right = a.bounds()
    if left is not None:
        s = s.masked_fill(k_pos < q_pos - left, -torch.inf)
    if right is not None:
        s = s.masked_fill(k_pos > q_pos + right, -torch.inf)
    return s


def _softmax_v(s: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Sq, H, Dv) and lse (Sq, H). A row without a visible key is 0 and, without a sink, -inf."""
    lse = torch.logsumexp(s, -1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    if sinks is not None:
        sink = repeat(sinks.to(s.dtype), "(kv g) -> kv g i", kv=s.shape[0], i=s.shape[2])
        lse = torch.logaddexp(lse, sink)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    out = einsum(p, v, "kv g i j, j kv d -> i kv g d")
    return out.flatten(1, 2), rearrange(lse, "kv g i -> i (kv g)")
