"""What CANN documents that its operators compute, in float64 on the CPU: the meaning of a call.

It knows nothing of the router: it reads an invocation's arguments as the operator's page defines them, with
`sparse_mode`, layouts, lengths, pages and NZ storage. What the documents leave open (rows without a key)
comes out as NaN here, so that a router that relied on it would fail.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_ops.router import Invocation

_FULL = 2147483647


def outputs(i: Invocation) -> Any:
    """What the operator would return, in the dtypes that it would."""
    return _OPERATORS[i.name](i.args, i.kwargs)


def _hidden(kw: dict[str, Any], sq: int, sk: int, b: int) -> Tensor:
    """bool, broadcastable to (H, sq, sk), True: hidden (docs/context/sparse_mode of ops-transformer)."""
    mode, mask = kw.get("sparse_mode", 0), kw.get("atten_mask")
    if mode == 0 and mask is None:
        return torch.zeros(1, sq, sk, dtype=torch.bool)
    assert mask is not None
    if mode == 1:
        full = mask.expand(-1 if mask.shape[0] > 1 else b + 1, -1, -1, -1)[b]
        return full[:, :sq, :sk]
    assert torch.equal(mask, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    offset = torch.arange(sk) - torch.arange(sq)[:, None] - (sk - sq)  # from the bottom right diagonal
    if mode == 3:
        return (offset > 0)[None]
    assert mode == 4
    before = kw.get("pre_tokens", kw.get("pre_tockens", _FULL))
    after = kw.get("next_tokens", kw.get("next_tockens", _FULL))
    return ((offset < -before) | (offset > after))[None]


def _one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor, sink: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, max, sum) of one sequence: q (sq, H, D), k (sk, Hkv, D), v (sk, Hkv, Dv)."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    s = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    if bias is not None:
        s = s + bias.double()
    s = s.masked_fill(hidden, -torch.inf)
    top = s.amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -torch.inf)
    if sink is not None:
        top = torch.maximum(top, sink.double()[:, None])
    p = torch.exp(s - top[..., None])
    total = p.sum(-1) + (0 if sink is None else torch.exp(sink.double()[:, None] - top))
    out = torch.einsum("hij,jhd->ihd", p / total[..., None], v)
    return out, top, total


def _fused_infer(args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k, v = args
    v2 = "num_query_heads" in kw
    q_key, k_key = (
        ("actual_seq_qlen", "actual_seq_kvlen") if v2 else ("actual_seq_lengths", "actual_seq_lengths_kv")
    )
    scale = kw["softmax_scale" if v2 else "scale"]
    heads, kv_heads = kw["num_query_heads" if v2 else "num_heads"], kw["num_key_value_heads"]
    tnd = kw["input_layout"] == "TND"
    table, page = kw.get("block_table"), kw.get("block_size", 0)
    if tnd:
        queries = list(q.split([b - a for a, b in pairwise([0, *kw[q_key]])]))
    else:
        assert kw["input_layout"] == "BSND"
        queries = list(q)
    if table is not None:
        k, v = (t.unflatten(-1, (kv_heads, -1)) for t in (k, v))
        keys = [k[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(kw[k_key])]
        values = [v[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(kw[k_key])]
        assert page == k.shape[1]
    elif tnd:
        sizes = [b - a for a, b in pairwise([0, *kw[k_key]])]
        keys, values = list(k.split(sizes)), list(v.split(sizes))
    else:
        lens = kw.get(k_key, [k.shape[1]] * len(queries))
        keys, values = ([t[b, :n] for b, n in enumerate(lens)] for t in (k, v))
    found = []
    for b, (a, c, d) in enumerate(zip(queries, keys, values, strict=True)):
        assert a.shape[1] == heads
        assert c.shape[1] == kv_heads
        seen = dict(kw)
        if a.shape[0] == 1 and not tnd and kw.get("sparse_mode", 0) != 1:
            seen |= {"sparse_mode": 0, "atten_mask": None}  # one row: sparse_mode and the tokens do nothing
        if a.shape[0] == 1 and not tnd and kw.get("atten_mask") is not None:
            assert c.shape[0] <= 512  # vllm-ascend #15503
        hidden = _hidden(seen, a.shape[0], c.shape[0], b)
        found.append(_one(a, c, d, scale, hidden, kw.get("learnable_sink"), None))
    outs = [f[0] for f in found]
    lses = [(f[1] + f[2].log()).t()[..., None] for f in found]  # (sq, H, 1)
    if tnd:
        return torch.cat(outs).to(q.dtype), torch.cat(lses).float()
    return torch.stack(outs).to(q.dtype), torch.stack(lses).transpose(1, 2).float()


def _fusion(args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Tensor, ...]:
    q, k, v, heads, layout = args
    if layout == "BNSD":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if layout == "TND":
        sizes = [[b - a for a, b in pairwise([0, *kw[n]])] for n in ("actual_seq_qlen", "actual_seq_kvlen")]
        triples = list(zip(q.split(sizes[0]), k.split(sizes[1]), v.split(sizes[1]), strict=True))
    else:
        triples = list(zip(q, k, v, strict=True))
    found = []
    for b, (a, c, d) in enumerate(triples):
        assert a.shape[1] == heads
        bias = kw.get("pse")
        if bias is not None:
            assert kw["pse_type"] == 0
            bias = bias[b if bias.shape[0] > 1 else 0]
        hidden = _hidden(kw, a.shape[0], c.shape[0], b)
        assert layout != "TND" or not hidden.all(-1).any()
        found.append(_one(a, c, d, kw["scale"], hidden, kw.get("sink"), bias))
    if layout == "TND":
        assert kw["softmax_layout"] == "TND"
        out = torch.cat([f[0] for f in found])
        rest = [torch.cat([f[n].t() for f in found])[..., None].expand(-1, -1, 8).float() for n in (1, 2)]
    else:
        out = torch.stack([f[0] for f in found])
        rest = [torch.stack([f[n] for f in found])[..., None].expand(-1, -1, -1, 8).float() for n in (1, 2)]
    out = out.transpose(1, 2) if layout == "BNSD" else out
    return out.to(q.dtype), *rest, out.new_empty(0)


def from_nz(t: Tensor) -> Tensor:
    """(1, C / 16, R, 16) as (R, C)."""
    return t[0].transpose(0, 1).flatten(1)


def _compressed(mask: Tensor) -> None:
    """Asserts that it is the canvas of a causal mask: 0 where seen, -10000 or -60000 where hidden."""
    assert torch.equal(mask <= -10000, torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    assert not mask.tril().any()


def _atb_prefill(args: tuple[Any, ...], kw: dict[str, Any]) -> None:
    mask, start = from_nz(kw["mask"]), 0
    if kw.get("mask_type") == 3:  # one canvas for any length
        _compressed(mask)
        longest = int(kw["seq_len"].max())
        mask = torch.zeros(longest, longest).masked_fill(torch.ones(longest, longest).triu(1) > 0, -torch.inf)
    for n in kw["seq_len"].tolist():
        rows = slice(start, start + n)
        triple = (kw[name][rows] for name in ("query", "key", "value"))
        hidden = (mask[:n, :n] == -torch.inf)[None]
        kw["out"][rows] = _one(*triple, kw["scale_value"], hidden, None, None)[0].to(kw["out"].dtype)
        start += n
    assert start == kw["query"].shape[0]


def _atb_paged(args: tuple[Any, ...], kw: dict[str, Any]) -> None:
    q, heads = kw["query"], kw["num_kv_heads"]
    lens = kw["seq_len"].tolist() if "seq_len" in kw else [1] * q.shape[0]
    start = 0
    for b, (n, used) in enumerate(zip(lens, kw["context_lens"].tolist(), strict=True)):
        pages = kw["block_table"][b].long()
        k, v = (
            kw[c][pages].permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:used].unflatten(1, (heads, -1))
            for c in ("key_cache", "value_cache")
        )
        hidden = torch.zeros(1, n, used, dtype=torch.bool)
        if kw.get("mask_type") == 5:
            _compressed(kw["mask"])
            hidden = (torch.arange(used) > torch.arange(used - n, used)[:, None])[None]
        elif "mask" in kw:
            hidden = (from_nz(kw["mask"])[start : start + n, :used] == -torch.inf)[None]
        out = _one(q[start : start + n], k, v, kw["scale_value"], hidden, None, None)[0]
        kw["out"][start : start + n] = out.to(q.dtype)
        start += n


def _rms(args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[Tensor, ...]:
    *xs, weight = args
    s = sum(x.double() for x in xs)
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + kw["epsilon"])
    y = (s * rstd * weight.double()).to(xs[0].dtype)
    return (y, rstd.float()) if len(xs) == 1 else (y, rstd.float(), s.to(xs[0].dtype))


def _rotary_mul(args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
    x, cos, sin = (t.double() for t in args)
    assert x.ndim == cos.ndim == sin.ndim == 4
    if kw["rotary_mode"] == "half":
        a, b = x.chunk(2, -1)
        turned = torch.cat((-b, a), -1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return (x * cos + turned * sin).to(args[0].dtype)


def _scatter(args: tuple[Any, ...], kw: dict[str, Any]) -> None:
    k, v, k_cache, v_cache, slots = args
    assert len(set(slots.tolist())) == slots.numel()
    assert slots.min() >= 0
    for new, cache in ((k, k_cache), (v, v_cache)):
        if kw.get("cache_mode", "PA_NZ") == "PA_NZ":
            page = cache.shape[2]
            for row, slot in zip(new.flatten(1), slots.tolist(), strict=True):
                cache[slot // page, :, slot % page] = row.view(-1, 16)
        else:
            cache.view(-1, *cache.shape[2:])[slots.long()] = new


def _quant_matmul(args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
    x, weight, scale = (t.double() for t in args)
    group = kw["antiquant_group_size"] or weight.shape[0]
    w = weight * scale.repeat_interleave(group, 0)[: weight.shape[0]]
    y = x @ w + (0 if kw.get("bias") is None else kw["bias"].double())
    return y.to(args[0].dtype)


def _swiglu(args: tuple[Any, ...], kw: dict[str, Any]) -> Tensor:
    gate, up = args[0].double().chunk(2, kw["dim"])
    return (F.silu(gate) * up).to(args[0].dtype)


_OPERATORS: dict[str, Any] = {
    "npu_fused_infer_attention_score": _fused_infer,
    "npu_fused_infer_attention_score_v2": _fused_infer,
    "npu_fusion_attention_v2": _fusion,
    "npu_fusion_attention_v3": _fusion,
    "_npu_flash_attention": _atb_prefill,
    "_npu_flash_attention_v3": _atb_prefill,
    "_npu_paged_attention": _atb_paged,
    "_npu_paged_attention_splitfuse": _atb_paged,
    "_npu_paged_attention_splitfuse_v2": _atb_paged,
    "npu_rms_norm": _rms,
    "npu_add_rms_norm": _rms,
    "npu_rotary_mul": _rotary_mul,
    "npu_scatter_pa_kv_cache": _scatter,
    "_npu_reshape_and_cache": _scatter,
    "npu_weight_quant_batchmatmul": _quant_matmul,
    "npu_swiglu": _swiglu,
}
