"""npu_fused_infer_attention_score v1 and v2 (FIA): CANN's operator for inference on 910B and A3.

Limits are those of its page among torch_npu's custom operators and of aclnnFusedInferAttentionScoreV4, and
the ones that users met: vllm-ascend #13699 (TND without a mask averages uniformly) and #15503 (one query row
ignores a mask past 512 keys).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import masks
from .call import AttentionCall, Lengths, zero_unseen
from .chips import Chip
from .invocation import Invocation, Results

V1, V2 = "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2"
_NEVER = (
    "softcap",
    "alibi_slopes",
    "cache_batch_idx",
    "cache_leftpad",
    "q_pos0",
    "k_pos0",
    "k_scale",
    "v_scale",
)
_TND_HEAD_DIMS = ((128, 128), (192, 128), (192, 192))
_PAGES = (128, 256, 384, 512)


def static_reasons(call: AttentionCall, chip: Chip, *, capturing: bool = False) -> list[str]:
    """Against the call, whatever its lengths. ``capturing``: into a graph, during which no value is read."""
    if V1 not in chip.operators and V2 not in chip.operators:
        return chip.lacks(V2)
    d, dv = call.head_dim, call.v_head_dim
    out = [f"{name}: not an argument of FIA" for name in call.given(_NEVER)]
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        out.append(f"dtype: {call.q.dtype}, FIA takes float16 and bfloat16")
    if call.k.dtype != call.q.dtype:
        out.append(f"k: {call.k.dtype}, q is {call.q.dtype}")
    if call.kv_layout != "nhd":
        out.append(f"kv_layout: {call.kv_layout!r}, FIA takes NZ only for int8 and for MLA")
    if d > 512 or d % 16:
        out.append(f"head_dim: {d}, a multiple of 16 up to 512")
    if d != dv and not _tnd(call):
        out.append(f"v: head_dim {dv}, q has {d}; they may differ only in layout TND (192 and 128)")
    if call.heads > 256 or call.heads > 64 * call.kv_heads:
        out.append(f"heads: {call.heads} over {call.kv_heads}, at most 256 and 64 to a KV head")
    if call.page_size and call.kv_heads * d > 65535:
        out.append(f"block_table: {call.kv_heads} KV heads of {d}, their product is at most 65535")
    if _packed(call) and not _tnd(call):
        out.append(
            f"cu_seqlens: layout TND takes head_dim 128, or 192 with 128 or 192 for v; not {d} and {dv}"
        )
    if call.cu_seqlens_k is not None and call.seqused_k is not None:
        out.append("cache_seqlens: TND counts packed keys by their ends, shorter ones cannot be said")
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is None and not call.page_size:
        out.append("cu_seqlens_q: packed queries need packed or paged keys")
    return out + _mask_reasons(call) + _sink_reasons(call, chip, capturing=capturing)


def _mask_reasons(call: AttentionCall) -> list[str]:
    mask = call.attn_mask
    if mask is None:
        return []
    if mask.dtype != torch.bool:
        return [f"attn_mask: {mask.dtype}, FIA takes bool"]
    if masks.narrow_broadcast(mask, 1).shape[1] > 1:
        return ["attn_mask: one per head, FIA takes one for all heads"]
    if call.page_size or call.seqused_k is not None:
        return ["attn_mask: with cache_seqlens, rows of different lengths cannot share it"]
    return []


def _sink_reasons(call: AttentionCall, chip: Chip, *, capturing: bool) -> list[str]:
    if call.sinks is None:
        return []
    if V2 not in chip.operators:
        return [f"sinks: only {V2} has learnable_sink"]
    if not _tnd(call) or call.v_head_dim > 128 or call.attn_mask is not None:
        return ["sinks: only in layout TND, without attn_mask, and with v's head_dim up to 128"]
    if call.return_lse:
        return ["sinks: whether FIA's lse counts them is not documented"]
    exact = _known_bfloat16(call.sinks)
    if exact is None and capturing and call.sinks.device.type != "cpu":
        return ["sinks: whether they are exact in bfloat16 cannot be read while a graph is captured"]
    if not (_is_bfloat16(call.sinks) if exact is None else exact):
        return ["sinks: FIA takes bfloat16, these float32 values are not exact there"]
    return []


def reasons(call: AttentionCall, lens: Lengths, chip: Chip) -> list[str]:
    """Against the call with these lengths; assumes that `static_reasons` gave none."""
    out = []
    batch, longest_q, longest_k = len(lens.q), max(lens.q), max(lens.k)
    tnd = _use_tnd(call, lens)
    limit = 4096 if tnd else 65536
    if batch > limit:
        out.append(f"batch: {batch}, at most {limit}")
    most = 262144 if longest_q == 1 and not tnd else 20971520
    if longest_k > most:
        out.append(f"k: {longest_k} keys, at most {most}")
    if tnd and max(sum(lens.q), 0 if call.page_size else sum(lens.k)) > 1 << 20:
        out.append(
            f"cu_seqlens: {sum(lens.q)} queries, {sum(lens.k)} keys, at most 2^20 together in layout TND"
        )
    if longest_q > 1 and not tnd and call.heads * call.head_dim >= 65535:
        out.append(f"heads: {call.heads} of {call.head_dim}, their product is below 65535 in layout BSND")
    if longest_q == 1 and not tnd:
        if _band_bites(call, lens):
            out.append("window: FIA ignores pre_tokens with one query row, except in layout TND")
        if call.attn_mask is not None and longest_k > 512:
            out.append(f"attn_mask: one query row and {longest_k} keys, past 512 it is ignored")
    if call.page_size:
        if max(call.k.numel(), call.v.numel()) >= 1 << 31:
            out.append(f"k, v: {call.k.numel()} and {call.v.numel()} elements, fewer than 2^31 in pages")
        pages = (p for p in range(16, 513, 16)) if longest_q == 1 and not tnd else _PAGES
        if call.page_size not in pages:
            rule = "a multiple of 16 up to 512" if longest_q == 1 and not tnd else "128, 256, 384 or 512"
            out.append(f"page size: {call.page_size}, FIA takes {rule}")
        needed = sum(-(-n // call.page_size) for n in lens.k)
        if needed > call.k.shape[0]:
            out.append(f"k: {call.k.shape[0]} pages for {needed} in use: shared pages are refused")
    return out


def invocation(call: AttentionCall, lens: Lengths, chip: Chip) -> Invocation:
    """The exact call; assumes that there are no reasons against it."""
    tnd = _use_tnd(call, lens)
    kwargs: dict[str, Any] = {
        "scale": call.scale,
        "num_heads": call.heads,
        "num_key_value_heads": call.kv_heads,
    }
    kwargs["input_layout"] = "TND" if tnd else "BSND"
    if tnd:
        q, k, v = _packed_qkv(call, lens)
        kwargs["actual_seq_lengths"] = list(accumulate(lens.q))
        kwargs["actual_seq_lengths_kv"] = list(lens.k) if call.page_size else list(accumulate(lens.k))
    else:
        q, k, v = (t.contiguous() for t in (call.q, call.k, call.v))
        if call.seqused_k is not None:
            kwargs["actual_seq_lengths_kv"] = list(lens.k)
    if call.page_size:
        # (blocks, block_size, H): the one layout of pages that every layout of q takes.
        k, v = (t.contiguous().flatten(2) for t in (call.k, call.v))
        kwargs |= {"block_table": call.block_table, "block_size": call.page_size}
    unseen = _mask(call, lens, tnd, kwargs)
    if call.sinks is not None:
        kwargs["learnable_sink"] = call.sinks.to(torch.bfloat16)
    kwargs["softmax_lse_flag"] = call.return_lse

    def finish(results: tuple[Tensor, Tensor]) -> Results:
        out, lse = results[0], results[1].squeeze(-1) if call.return_lse else None
        if not tnd and unseen is None:
            return _finish_dense(out, lse, call, lens)
        if not tnd:
            assert unseen is not None
            out = out.masked_fill(unseen[..., None], 0.0)
            return out, None if lse is None else lse.masked_fill(unseen.transpose(1, 2), -torch.inf)
        return _finish_packed(out, lse, call, lens)

    if V2 in chip.operators:
        kwargs = {_V2_NAMES.get(name, name): value for name, value in kwargs.items()}
    return Invocation("npu", V2 if V2 in chip.operators else V1, (q, k, v), kwargs, finish)


_V2_NAMES = {
    "scale": "softmax_scale",
    "num_heads": "num_query_heads",
    "actual_seq_lengths": "actual_seq_qlen",
    "actual_seq_lengths_kv": "actual_seq_kvlen",
    "softmax_lse_flag": "return_softmax_lse",
}


def _mask(call: AttentionCall, lens: Lengths, tnd: bool, kwargs: dict[str, Any]) -> Tensor | None:
    """Sets the arguments that hide keys; the rows (B | 1, Sq, 1) that a user's mask leaves without a key."""
    if call.attn_mask is not None:
        keep = masks.narrow_broadcast(call.attn_mask, 0, 1)
        hidden = masks.hidden(keep, call.left, call.right)
        # Bit 1 of inner_precise: rows that are hidden as a whole are computed as such.
        kwargs |= {"atten_mask": hidden, "sparse_mode": 1, "inner_precise": 2 if max(lens.q) > 1 else 0}
        return hidden.all(-1).transpose(1, 2)
    if not tnd and (max(lens.q) == 1 or (call.left is None and call.right is None)):
        return None
    kwargs |= masks.band(call.left, call.right, call.q.device)  # without bounds too, in TND
    if any(lens.unseen(call.right)) and max(lens.q) > 1:
        kwargs["inner_precise"] = 2
    return None


def _finish_dense(out: Tensor, lse: Tensor | None, call: AttentionCall, lens: Lengths) -> Results:
    if any(lens.unseen(call.right)):
        for b, count in enumerate(lens.unseen(call.right)):
            out[b, :count] = 0.0
            if lse is not None:
                lse[b, :, :count] = -torch.inf
    return out, lse


def _finish_packed(out: Tensor, lse: Tensor | None, call: AttentionCall, lens: Lengths) -> Results:
    """From (T, H, Dv) and (T, H) to the shapes of the call; T may be shorter than its rows."""
    lse = None if lse is None else lse.transpose(0, 1)
    if call.q.ndim == 3 and out.shape[0] < call.q.shape[0]:
        missing = call.q.shape[0] - out.shape[0]
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, missing))
        lse = None if lse is None else torch.nn.functional.pad(lse, (0, missing))
    if any(lens.unseen(call.right)) or sum(lens.q) < out.shape[0]:
        lse = None if lse is None else lse.clone()
        zero_unseen(out, lse, lens, call.right)
    if call.q.ndim == 3:
        return out, lse
    shape = call.q.shape[:2]
    return out.unflatten(0, shape), None if lse is None else lse.unflatten(1, shape).transpose(0, 1)


def _packed_qkv(call: AttentionCall, lens: Lengths) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N, D) without rows past the last sequence."""
    q = call.q.flatten(0, 1) if call.q.ndim == 4 else call.q[: sum(lens.q)]
    k, v = call.k, call.v
    if not call.page_size:
        k, v = (t.flatten(0, 1) if t.ndim == 4 else t[: sum(lens.k)] for t in (k, v))
    return q.contiguous(), k.contiguous(), v.contiguous()


def _packed(call: AttentionCall) -> bool:
    return call.cu_seqlens_q is not None or call.cu_seqlens_k is not None


def _tnd(call: AttentionCall) -> bool:
    """Whether layout TND could take the call."""
    dense_cache = call.seqused_k is not None and not call.page_size
    dims = (call.head_dim, call.v_head_dim)
    return dims in _TND_HEAD_DIMS and call.attn_mask is None and not dense_cache


def _use_tnd(call: AttentionCall, lens: Lengths) -> bool:
    """TND where it is needed: packed, unlike head_dims, sinks, or a band over one query row."""
    if not _tnd(call):
        return False
    unlike = call.head_dim != call.v_head_dim
    one_row = max(lens.q) == 1 and _band_bites(call, lens)
    return _packed(call) or unlike or call.sinks is not None or one_row


def _band_bites(call: AttentionCall, lens: Lengths) -> bool:
    """Whether one query row per sequence, which is the last position, has keys hidden from it."""
    return call.left is not None and call.left < max(lens.k) - 1


_exact = WeakTensorKeyDictionary()  # tensor: (version, exact); sinks are parameters: looked at once


def _known_bfloat16(t: Tensor) -> bool | None:
    """What `_is_bfloat16` found for these values; None if it has not seen them."""
    if t.is_inference():  # has no version, which would tell a change
        return None
    version, found = _exact.get(t, (None, None))
    return found if version == t._version else None  # noqa: SLF001


def _is_bfloat16(t: Tensor) -> bool:
    found = bool((t.to(torch.bfloat16).float() == t).all())
    if not t.is_inference():
        _exact[t] = (t._version, found)  # noqa: SLF001
    return found
