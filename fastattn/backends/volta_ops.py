"""The small ops of the Volta backend, adapted from `cuda_volta`. Dense matrices are torch's (cuBLAS)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    Op,
    OpSignature,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)
from ..strides import contiguous_rows
from . import torch_ops
from .volta import device_reasons, dtype_reasons

if TYPE_CHECKING:
    from cuda_volta.weights import GroupedWeight


# --------------------------------------------------------------------------------- rotary and KV append
def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor."""
    from cuda_volta.rotary import rotary as run

    torch_ops.check_indices(a.positions, "positions", a.cos.shape[0])
    return run(contiguous_rows(a.x), a.cos, a.sin, a.positions, a.interleaved)


def _rotary_reasons(s: OpSignature) -> list[str]:
    (table,) = s.other_dtypes
    reasons = device_reasons(s.device) + dtype_reasons(s.dtype)
    return reasons + ([] if table == torch.float32 else [f"cos and sin are {table}, it takes torch.float32"])


def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the caches; slots outside are skipped.

    Raises ValueError for a slot past the cache that the host can see; nothing is written then.
    """
    from cuda_volta.append import append_kv as run

    torch_ops.check_indices(a.slots, "slots", a.k_cache.shape[0] * a.k_cache.shape[1], lowest=-(1 << 62))
    if a.cos is not None and a.positions is not None:
        torch_ops.check_indices(a.positions, "positions", a.cos.shape[0])
    run(
        a.k_cache, a.v_cache, contiguous_rows(a.k), contiguous_rows(a.v), a.slots,
        cos=a.cos, sin=a.sin, positions=a.positions, interleaved=a.interleaved,
        k_scale=a.k_scale, v_scale=a.v_scale,
    )  # fmt: skip


def _append_reasons(s: OpSignature) -> list[str]:
    (cache,) = s.other_dtypes
    return device_reasons(s.device) + dtype_reasons(s.dtype) + dtype_reasons(cache, "the cache is")


# ------------------------------------------------------------------------------------------ norm, gate
def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual), both in x's dtype; the sum is empty without a residual."""
    from cuda_volta.norm import rms_norm as run

    residual = None if a.residual is None else contiguous_rows(a.residual)
    return run(contiguous_rows(a.x), a.weight, a.eps, residual)


def _rms_norm_reasons(s: OpSignature) -> list[str]:
    weight, *residual = s.other_dtypes
    reasons = device_reasons(s.device) + dtype_reasons(s.dtype)
    if weight not in (torch.float16, torch.float32):
        reasons.append(f"weight is {weight}, it takes torch.float16 and torch.float32")
    return reasons + [why for dtype in residual for why in dtype_reasons(dtype, "residual is")]


def swiglu(a: SwigluArgs) -> Tensor:
    """``silu(gate) * up`` of x (..., 2 F)."""
    from cuda_volta.gate import swiglu as run

    return run(contiguous_rows(a.x))


def _float16_reasons(s: OpSignature) -> list[str]:
    return device_reasons(s.device) + dtype_reasons(s.dtype)


# ---------------------------------------------------------------------------------------------- matrices
def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias``. ``act`` allows x to be quantized, which Volta gains nothing by."""
    from cuda_volta.linear import linear as run

    if a.weight.format == "dense":
        return torch_ops.linear(a)
    return run(contiguous_rows(a.x), _grouped(a.weight))


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W (N, in). Raises ValueError for an id outside W that the host can see."""
    from cuda_volta.embedding import embedding as run

    if a.weight.format == "dense":
        return torch_ops.embedding(a)
    torch_ops.check_indices(a.ids, "ids", a.weight.shape[0])
    return run(a.ids, _grouped(a.weight))


def _grouped(w: PackedWeight) -> GroupedWeight:
    from cuda_volta.weights import GroupedWeight

    codes, scales, mins = (w.tensors.get(name) for name in ("codes", "scales", "mins"))
    assert codes is not None  # of both formats that are not dense
    assert scales is not None
    return GroupedWeight(
        {"int4": 4, "int8": 8}[w.format], w.shape, codes, scales, mins,
        w.group_size, w.group_offset, w.g_idx, w.x_perm, w.bias,
    )  # fmt: skip


OPS: dict[str, Op] = {
    "append_kv": Op(append_kv, torch_ops.OPS["append_kv"].features, _append_reasons),
    "rotary": Op(rotary, frozenset({"interleaved"}), _rotary_reasons),
    "rms_norm": Op(rms_norm, frozenset({"residual"}), _rms_norm_reasons),
    "swiglu": Op(swiglu, reasons=_float16_reasons),
    "linear": Op(linear, torch_ops.OPS["linear"].features, _float16_reasons),
    "embedding": Op(embedding, torch_ops.OPS["embedding"].features, _float16_reasons),
}
