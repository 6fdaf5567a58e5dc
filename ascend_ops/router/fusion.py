"""npu_fusion_attention v2 and v3: CANN's operator for training, on 910B and (v2) 950.

It takes what the inference operator does not: float32, any head_dim, one mask or bias per head. Limits are
those of its page among torch_npu's custom operators and of aclnnFlashAttentionScoreV2. v3 is the form that a
graph can capture.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import masks
from .call import AttentionCall, Lengths, zero_unseen
from .chips import Chip
from .invocation import Invocation, Results

V2, V3 = "npu_fusion_attention_v2", "npu_fusion_attention_v3"
_NEVER = (
    "softcap", "alibi_slopes", "block_table", "seqused_k", "cache_batch_idx", "cache_leftpad", "q_pos0",
    "k_pos0", "k_scale", "v_scale",
)  # fmt: skip


def static_reasons(call: AttentionCall, chip: Chip, *, capturing: bool = False) -> list[str]:
    """Against the call, whatever its lengths. ``capturing``: into a graph, which takes v3 and dense calls."""
    name = V3 if capturing else V2
    if name not in chip.operators:
        return chip.lacks(name)
    d, dv = call.head_dim, call.v_head_dim
    out = [f"{n}: not an argument of {name}" for n in call.given(_NEVER)]
    if call.q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        out.append(f"dtype: {call.q.dtype}, it takes float16, bfloat16 and float32")
    if call.k.dtype != call.q.dtype:
        out.append(f"k: {call.k.dtype}, q is {call.q.dtype}")
    if call.kv_layout != "nhd":
        out.append(f"kv_layout: {call.kv_layout!r}, it takes nhd")
    if d > 768 or dv > d:
        out.append(f"head_dim: {d} and {dv} of v, it takes up to 768 and v's up to q's")
    if call.heads > 256:
        out.append(f"heads: {call.heads}, at most 256")
    if (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None):
        out.append("cu_seqlens: both of q and k, or neither")
    if call.sinks is not None and call.return_lse:
        out.append("sinks: whether softmax_sum counts them is not documented")
    if capturing and call.cu_seqlens_q is not None:
        out.append(f"cu_seqlens_q: {name} is captured in layout BNSD only")
    mask = call.attn_mask
    if mask is not None and mask.dtype != torch.bool:
        if capturing:
            out.append(f"attn_mask: {name} scales an added mask with the scores")
        elif mask.dtype != call.q.dtype:
            out.append(f"attn_mask: {mask.dtype}, an added mask has q's {call.q.dtype}")
    return out


def reasons(call: AttentionCall, lens: Lengths) -> list[str]:
    """Against the call with these lengths."""
    out = []
    batch, packed = len(lens.q), call.cu_seqlens_q is not None
    most = 1024 if packed else 2 << 20
    if batch > most:
        out.append(f"batch: {batch}, at most {most}")
    if max(*lens.q, *lens.k, *((sum(lens.q), sum(lens.k)) if packed else ())) > 1 << 20:
        out.append("q, k: sequences of at most 2^20, packed ones together")
    if packed and any(lens.unseen(call.right)):
        out.append("cu_seqlens: a query without a visible key is not allowed in layout TND")
    return out


def invocation(call: AttentionCall, lens: Lengths, *, capturing: bool = False) -> Invocation:
    """The exact call; assumes that there are no reasons against it."""
    packed = call.cu_seqlens_q is not None
    if packed:
        layout, q, k, v = "TND", call.q[: sum(lens.q)], call.k[: sum(lens.k)], call.v[: sum(lens.k)]
    elif capturing:
        layout, (q, k, v) = "BNSD", (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    else:
        layout, q, k, v = "BSND", call.q, call.k, call.v
    kwargs: dict[str, Any] = {"scale": call.scale}
    if packed:
        kwargs["actual_seq_qlen"] = list(accumulate(lens.q))
        kwargs["actual_seq_kvlen"] = list(accumulate(lens.k))
        kwargs["softmax_layout"] = "TND"
    if call.sinks is not None:
        kwargs["sink"] = call.sinks
    unseen = _mask(call, lens, kwargs)
    if capturing:
        kwargs = {_V3_NAMES.get(n, n): value for n, value in kwargs.items()}

    def finish(results: tuple[Tensor, ...]) -> Results:
        out = results[0].transpose(1, 2) if capturing else results[0]
        lse = None
        if call.return_lse:  # both (..., 8), one value eight times
            lse = results[1][..., 0] + results[2][..., 0].log()
            if packed:
                lse = lse.transpose(0, 1)
        if unseen is not None:
            out = out.masked_fill(unseen.transpose(1, 2)[..., None], 0.0)
            lse = None if lse is None else lse.masked_fill(unseen, -torch.inf)
        return _pad_packed(out, lse, call, lens) if packed else (out, lse)

    args = (q.contiguous(), k.contiguous(), v.contiguous(), call.heads, layout)
    return Invocation("npu", V3 if capturing else V2, args, kwargs, finish)


_V3_NAMES = {"pre_tokens": "pre_tockens", "next_tokens": "next_tockens"}


def _mask(call: AttentionCall, lens: Lengths, kwargs: dict[str, Any]) -> Tensor | None:
    """Sets the arguments that hide keys; the rows (B | 1, H | 1, Sq) that are left without a key."""
    if call.attn_mask is None:
        if call.left is None and call.right is None:
            return None
        kwargs |= masks.band(call.left, call.right, call.q.device)
        if not any(lens.unseen(call.right)):
            return None
        kwargs["inner_precise"] = 2
        rows = torch.arange(call.q.shape[1], device=call.q.device) < lens.unseen(call.right)[0]
        return rows[None, None]
    mask = masks.narrow_broadcast(call.attn_mask, 0)
    if mask.dtype == torch.bool:
        keep = masks.narrow_broadcast(mask, 1)
    else:
        keep = mask != -torch.inf
        # pse_type 0 adds to the scaled scores, as here; what is hidden goes into the mask instead.
        kwargs |= {"pse": mask.masked_fill(~keep, 0.0).contiguous(), "pse_type": 0}
    hidden = masks.hidden(keep, call.left, call.right)
    unseen = hidden.all(-1)
    if hidden.shape[1] > 1:  # BNSS, B1SS and 11SS are taken, 1NSS is not
        hidden = hidden.expand(call.q.shape[0], -1, -1, -1).contiguous()
    kwargs |= {"atten_mask": hidden, "sparse_mode": 1, "inner_precise": 2}
    return unseen


def _pad_packed(out: Tensor, lse: Tensor | None, call: AttentionCall, lens: Lengths) -> Results:
    missing = call.q.shape[0] - out.shape[0]
    if missing:
        out = torch.nn.functional.pad(out, (0, 0, 0, 0, 0, missing))
        lse = None if lse is None else torch.nn.functional.pad(lse, (0, missing))
        zero_unseen(out, lse, lens, call.right)
    return out, lse
