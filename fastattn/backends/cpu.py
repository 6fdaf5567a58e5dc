"""The native CPU kernels: the embedded default. Attention is adapted here, the small ops in `cpu_ops`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..spec import AttentionArgs, Backend, Op

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _run_attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    """(out, lse), lse empty unless asked for. Raises ValueError for a length or page out of range.

    Rows past the last packed sequence see no key.
    """
    from ..native import kernels

    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (a.q, a.k, a.v))
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(_lse_shape(a) if a.return_lse else (0,), dtype=torch.float32)
    left, right = a.bounds()
    kernels.attention(
        q,
        k,
        v,
        out,
        lse if a.return_lse else None,
        a.scale,
        a.softcap,
        left,
        right,
        _contiguous(a.alibi_slopes),
        _contiguous(a.sinks),
        None if a.attn_mask is None else _full_mask(a, a.attn_mask),
        _contiguous(a.cu_seqlens_q),
        _contiguous(a.cu_seqlens_k),
        _contiguous(a.block_table),
        _contiguous(a.seqused_k),
        _contiguous(a.cache_batch_idx),
        _leftpad(a),
        _contiguous(a.q_pos0),
        _contiguous(a.k_pos0),
        _contiguous(a.k_scale),
        _contiguous(a.v_scale),
        torch.get_num_threads(),
    )
    if a.cu_seqlens_q is not None and (end := int(a.cu_seqlens_q[-1])) < q.shape[0]:
        out[end:] = 0.0
        if a.return_lse:
            lse[:, end:] = -torch.inf
    return out, lse


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _leftpad(a: AttentionArgs) -> Tensor | None:
    """At most the keys in use, more than which the kernel does not take."""
    if a.cache_leftpad is None:
        return None
    if a.seqused_k is not None:
        return a.cache_leftpad.minimum(a.seqused_k)
    if a.cu_seqlens_k is not None:
        return a.cache_leftpad.minimum(a.cu_seqlens_k.diff())
    return a.cache_leftpad.clamp(max=a.k.shape[1])


def _lse_shape(a: AttentionArgs) -> tuple[int, ...]:
    return (*a.q.shape[:-3], a.q.shape[-2], a.q.shape[-3])


def _full_mask(a: AttentionArgs, mask: Tensor) -> Tensor:
    """The mask as a (B, H, Sq, Sk) view; broadcast dimensions have stride 0."""
    columns = a.k.shape[1] if a.block_table is None else a.block_table.shape[1] * a.k.shape[1]
    return mask.expand(a.q.shape[0], a.q.shape[2], a.q.shape[1], columns)


def _attention_reasons(signature: Any) -> list[str]:
    reasons = []
    if signature.dtype not in _DTYPES:
        reasons.append(f"dtype {signature.dtype}, it takes float32, float16 and bfloat16")
    elif signature.kv_dtype != signature.dtype:
        reasons.append(f"k and v are {signature.kv_dtype}, it takes q's {signature.dtype}")
    if signature.mask_dtype not in (None, torch.bool, torch.float32, signature.dtype):
        reasons.append(f"attn_mask is {signature.mask_dtype}, it takes bool, float32 and {signature.dtype}")
    return reasons


def _available() -> list[str]:
    try:
        from .. import native  # noqa: F401
    except ImportError as error:
        return [str(error)]
    return []


def _ops() -> Mapping[str, Op]:
    from . import cpu_ops

    features = frozenset(AttentionArgs._field_defaults) - {"kv_layout"}
    return {"attention": Op(_run_attention, features, _attention_reasons), **cpu_ops.OPS}


def _describe() -> Mapping[str, str]:
    from .. import native

    build = native.build_info()
    return {
        "instruction set": f"{native.isa()} (of {', '.join(native.available_isas())})",
        "threads": str(torch.get_num_threads()),
        "compiler": build["compiler"],
        "flags": build["flags"],
        "pybind11": build["pybind11"],
    }


BACKEND = Backend("cpu", ("cpu",), _available, _ops, _describe)
