"""What an operator demands of its arguments and torch_npu's meta kernels do not check.

A wrong keyword or layout is refused by the schemas; shapes that contradict each other, lengths that do not
add up and masks of another size are not: on a device they give wrong answers or a trap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .invocation import Invocation
from .masks import COMPRESSED

Named = dict[str, Any]


def faults(i: Invocation) -> list[str]:
    """What is wrong with an invocation; [] if nothing is."""
    check = _CHECKS.get(i.name)
    if check is None:
        return [f"{i.name}: no check is known for it"]
    tensors = [(f"argument {n}", t) for n, t in enumerate(i.args)] + list(i.kwargs.items())
    odd = [f"{n}: not contiguous" for n, t in tensors if isinstance(t, Tensor) and not _dense(t, i.name)]
    return odd + check(i.args, i.kwargs)


def _dense(t: Tensor, name: str) -> bool:
    """Contiguous, or a transposed matrix where the operator takes one."""
    transposable = name in ("npu_weight_quant_batchmatmul", "npu_mm_all_reduce_base") and t.ndim == 2
    return t.is_contiguous() or (transposable and t.t().is_contiguous())


def _expect(name: str, found: Any, wanted: Any) -> list[str]:
    return [] if found == wanted else [f"{name}: {found}, expected {wanted}"]


def _fused_infer(args: tuple[Any, ...], kw: Named) -> list[str]:
    v2 = "num_query_heads" in kw
    names = (
        ("actual_seq_qlen", "actual_seq_kvlen", "num_query_heads", "return_softmax_lse")
        if v2
        else ("actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "softmax_lse_flag")
    )
    q_ends, k_lens, heads = kw.get(names[0]), kw.get(names[1]), kw[names[2]]
    q, k, v = args
    out = _expect("dtypes", {k.dtype, v.dtype}, {q.dtype})
    kv_heads, table = kw["num_key_value_heads"], kw.get("block_table")
    tnd = kw["input_layout"] == "TND"
    if tnd:
        batch = len(q_ends or ())
        out += _ends("actual_seq_qlen", q_ends, q.shape[0]) + _expect("heads of q", q.shape[1], heads)
        rows = max(b - a for a, b in zip([0, *q_ends], q_ends, strict=False)) if q_ends else 0
        out += _expect("lengths of keys", len(k_lens or ()), batch)
        if table is None:
            out += _ends("actual_seq_kvlen", k_lens, k.shape[0])
        if (q.shape[2], v.shape[2] if table is None else q.shape[2]) not in (
            (128, 128),
            (192, 128),
            (192, 192),
        ):
            out.append(f"head_dim: {q.shape[2]}, TND takes 128 and 192")
        if kw.get("sparse_mode", 0) not in (3, 4):
            out.append(f"sparse_mode: {kw.get('sparse_mode', 0)}, TND is right only with a compressed mask")
    else:
        batch, rows = q.shape[:2]
        out += _expect("heads of q", q.shape[2], heads)
    if table is not None:
        page = kw["block_size"]
        out += _expect("pages", (k.ndim, k.shape[1:]), (3, (page, kv_heads * q.shape[-1])))
        out += _expect("batch of block_table", table.shape[0], batch) + _expect(
            "dtype", table.dtype, torch.int32
        )
        if k_lens is None or max(k_lens) > table.shape[1] * page:
            out.append(f"actual_seq_kvlen: {k_lens}, block_table holds {table.shape[1] * page}")
    elif not tnd:
        out += _expect("k", (*k.shape[::2], k.shape[3]), (batch, kv_heads, q.shape[3]))
        out += _expect("v", v.shape, k.shape)
        if k_lens is not None and (len(k_lens) != batch or max(k_lens) > k.shape[1]):
            out.append(f"actual_seq_kvlen: {k_lens}, k holds {batch} times {k.shape[1]}")
    else:
        out += _expect("heads of k", k.shape[1], kv_heads)
    decode = rows == 1 and not tnd
    return out + _sparse(kw, rows if not tnd else 2, k.shape[1], decode=decode)


def _fusion(args: tuple[Any, ...], kw: Named) -> list[str]:
    q, k, v, heads, layout = args
    out = _expect("dtypes", {k.dtype, v.dtype}, {q.dtype})
    if layout == "TND":
        out += _ends("actual_seq_qlen", kw.get("actual_seq_qlen"), q.shape[0])
        out += _ends("actual_seq_kvlen", kw.get("actual_seq_kvlen"), k.shape[0])
        rows, columns = q.shape[0], k.shape[0]
    else:
        s = 1 if layout == "BSND" else 2
        rows, columns = q.shape[s], k.shape[s]
        out += _expect("batch", k.shape[0], q.shape[0])
    out += _expect("heads of q", q.shape[2 if layout == "BSND" else 1], heads)
    out += _expect("v", v.shape[:-1], k.shape[:-1]) + _expect("head_dim of k", k.shape[-1], q.shape[-1])
    if v.shape[-1] > q.shape[-1]:
        out.append(f"head_dim of v: {v.shape[-1]}, at most {q.shape[-1]}")
    pse = kw.get("pse")
    if pse is not None:
        out += _expect(
            "pse", (pse.dtype, kw.get("pse_type"), pse.shape[1:]), (q.dtype, 0, (heads, rows, columns))
        )
    mask = kw.get("atten_mask")
    if kw.get("sparse_mode") == 1 and mask is not None:
        batch = q.shape[0]
        if tuple(mask.shape[:-2]) not in ((batch, heads), (batch, 1), (1, 1)):
            out.append(f"atten_mask: {tuple(mask.shape)}, for a batch or one head each, or one for all")
    return out + _sparse(kw, rows, columns, decode=False)


def _sparse(kw: Named, rows: int, columns: int, *, decode: bool) -> list[str]:
    """The mask against `sparse_mode`."""
    mode, mask = kw.get("sparse_mode", 0), kw.get("atten_mask")
    names = ("pre_tokens", "pre_tockens", "next_tokens", "next_tockens")
    tokens = [n for n in names if n in kw]
    out = []
    if mode == 0:
        if mask is not None or tokens:
            out.append(f"sparse_mode: 0 with {tokens or 'atten_mask'}, which count from the top left there")
    elif mask is None:
        out.append(f"atten_mask: none, sparse_mode {mode} needs one")
    elif mode in (2, 3, 4):
        out += _expect("atten_mask", (mask.dtype, tuple(mask.shape)), (torch.bool, (COMPRESSED, COMPRESSED)))
    elif mode == 1:
        out += _expect("atten_mask", (mask.dtype, tuple(mask.shape[-2:])), (torch.bool, (rows, columns)))
    if (mode == 4) != bool(tokens):
        out.append(f"sparse_mode: {mode} with {tokens}, mode 4 alone reads them")
    if decode and mode not in (0, 1):
        out.append(f"sparse_mode: {mode}, with one query row it is ignored")
    return out


def _ends(name: str, found: Any, total: int) -> list[str]:
    ordered = found is not None and all(a <= b for a, b in zip([0, *found], found, strict=False))
    return (
        [] if ordered and found[-1] == total else [f"{name}: {found}, expected ascending ends up to {total}"]
    )


def _atb_prefill(args: tuple[Any, ...], kw: Named) -> list[str]:
    q, k, mask, lens = (kw[n] for n in ("query", "key", "mask", "seq_len"))
    out = _expect("rows", (q.shape[0] % 16, k.shape[0]), (0, q.shape[0]))
    out += _expect("sum of seq_len", int(lens.sum()), q.shape[0])
    out += _expect("seq_len", lens.device.type, "cpu")
    compressed = "mask_type" in kw
    out += _expect("mask_type", kw["mask_type"], 3) if compressed else []
    size = COMPRESSED if compressed else -(-int(lens.max()) // 16) * 16
    return out + _expect("mask", (mask.dtype, tuple(mask.shape)), (torch.float16, (1, size // 16, size, 16)))


def _atb_paged(args: tuple[Any, ...], kw: Named) -> list[str]:
    q, cache, table = kw["query"], kw["key_cache"], kw["block_table"]
    out = _expect("key_cache", cache.shape[1] * 16, kw["num_kv_heads"] * q.shape[2])
    out += _expect("value_cache", kw["value_cache"].shape, cache.shape)
    out += _expect("last dimension of an NZ cache", cache.shape[3], 16)
    batch = q.shape[0]
    if "seq_len" in kw:
        batch = kw["seq_len"].numel()
        out += _expect("sum of seq_len", int(kw["seq_len"].sum()), q.shape[0])
        out += _expect("seq_len", kw["seq_len"].device.type, "cpu")
    if "mask_type" in kw:
        mask = (kw["mask"].dtype, tuple(kw["mask"].shape), kw["mask_type"])
        out += _expect("mask", mask, (torch.float16, (COMPRESSED, COMPRESSED), 5))
    elif "mask" in kw:
        rows, width = kw["mask"].shape[2], kw["mask"].shape[1] * 16
        out += _expect("rows of mask", rows, -(-q.shape[0] // 16) * 16)
        if width < int(kw["context_lens"].max()):
            out.append(f"mask: {width} columns, the longest sequence has {int(kw['context_lens'].max())}")
    return out + _expect("batch", (table.shape[0], kw["context_lens"].shape[0]), (batch, batch))


def _norm(args: tuple[Any, ...], kw: Named) -> list[str]:
    *xs, weight = args
    out = _expect("weight", weight.shape, xs[0].shape[-1:])
    return out + (
        _expect("residual", (xs[1].shape, xs[1].dtype), (xs[0].shape, xs[0].dtype)) if xs[1:] else []
    )


def _rotary(args: tuple[Any, ...], kw: Named) -> list[str]:
    x, cos, sin = args
    out = _expect("dtype", cos.dtype, x.dtype) + _expect("dimensions of input", x.ndim, 4)
    wanted = (1, x.shape[1], 1, x.shape[-1])  # BSND, the cosines of one sequence for all
    return out + _expect("cos, sin", (cos.shape, sin.shape), (wanted, wanted))


def _scatter(args: tuple[Any, ...], kw: Named) -> list[str]:
    key, value, k_cache, v_cache, slots = args
    out = _expect("dtypes", {value.dtype, k_cache.dtype, v_cache.dtype}, {key.dtype})
    out += _expect("slots", slots.shape, key.shape[:1]) + _expect("heads", value.shape[:2], key.shape[:2])
    for cache, new in ((k_cache, key), (v_cache, value)):
        # NZ, where the last dimension is a fractal's, or (pages, page, heads, head_dim).
        width = cache.shape[1] * cache.shape[3] if _nz(kw) else cache.shape[2] * cache.shape[3]
        out += _expect("elements of a slot", width, new.shape[1:].numel())
    return out


def _nz(kw: Named) -> bool:
    return bool(kw.get("cache_mode", "PA_NZ") == "PA_NZ")


def _quant_matmul(args: tuple[Any, ...], kw: Named) -> list[str]:
    x, weight, scale = args
    k, n = weight.shape
    group = kw.get("antiquant_group_size", 0)
    rows = -(-k // group) if group else 1
    out = _expect("x", x.shape[1], k) + _expect("scale", (scale.shape, scale.dtype), ((rows, n), x.dtype))
    offset = kw.get("antiquant_offset")
    if offset is not None:
        out += _expect("offset", (offset.shape, offset.dtype), (scale.shape, scale.dtype))
    if group and (group % 32 or not 32 <= group <= k - 1):
        out.append(f"antiquant_group_size: {group}, a multiple of 32 up to {k - 1}")
    return out + ([f"weight: {k} by {n}, at most 65535"] if max(k, n) > 65535 else [])


def _mm_all_reduce(args: tuple[Any, ...], kw: Named) -> list[str]:
    x1, x2, hcom = args
    out = _expect("x2", (x2.ndim, x2.shape[0], x2.dtype), (2, x1.shape[-1], x1.dtype))
    if x1.ndim not in (2, 3) or not x1.is_contiguous():
        out.append(f"x1: {tuple(x1.shape)}, expected 2 or 3 dimensions, not transposed")
    if not x1.numel() or not x2.numel():
        out.append("x1, x2: empty tensors are refused")
    return out + ([] if hcom else ["hcom: the name of an HCCL group"])


def _swiglu(args: tuple[Any, ...], kw: Named) -> list[str]:
    return (
        []
        if args[0].shape[-1] % 2 == 0 and args[0].numel()
        else ["input: empty, or odd in its last dimension"]
    )


_CHECKS: dict[str, Callable[[tuple[Any, ...], Named], list[str]]] = {
    "npu_fused_infer_attention_score": _fused_infer,
    "npu_fused_infer_attention_score_v2": _fused_infer,
    "npu_fusion_attention_v2": _fusion,
    "npu_fusion_attention_v3": _fusion,
    "_npu_flash_attention": _atb_prefill,
    "_npu_flash_attention_v3": _atb_prefill,
    "_npu_paged_attention": _atb_paged,
    "_npu_paged_attention_splitfuse": _atb_paged,
    "_npu_paged_attention_splitfuse_v2": _atb_paged,
    "npu_rms_norm": _norm,
    "npu_add_rms_norm": _norm,
    "npu_rotary_mul": _rotary,
    "npu_scatter_pa_kv_cache": _scatter,
    "_npu_reshape_and_cache": lambda args, kw: _scatter(args, {"cache_mode": "PA_NZ"}),
    "npu_swiglu": _swiglu,
    "npu_weight_quant_batchmatmul": _quant_matmul,
    "npu_mm_all_reduce_base": _mm_all_reduce,
}
