"""torch_npu's operators for RMSNorm, SwiGLU, rotary embedding, KV append and integer matmul.

Each function gives the call, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .atb import nz_view
from .call import host
from .chips import Chip
from .invocation import Invocation

Choice = Invocation | str
_HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (*_HALVES, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, chip: Chip) -> Choice:
    """``weight * s / sqrt(mean(s^2) + eps)``, s = x + residual: (normalised, s | None)."""
    name = "npu_rms_norm" if residual is None else "npu_add_rms_norm"
    if name not in chip.operators:
        return f"{name} does not exist on {chip.family}"
    newer = chip.family in ("910b", "910_93", "950")
    if x.dtype not in (_FLOATS if newer else (torch.float16, torch.float32)):
        return f"dtype: {x.dtype}"
    if not x.numel():
        return "x: empty"
    mixed = residual is None and newer and weight.dtype == torch.float32
    if weight.dtype != x.dtype and not mixed:
        return f"weight: {weight.dtype}, x is {x.dtype}"
    if not newer and x.shape[-1] * x.element_size() < 32:
        return f"x: rows of {x.shape[-1]}, at least 32 bytes on {chip.family}"
    if residual is None:
        return Invocation(
            "npu", name, (x.contiguous(), weight), {"epsilon": eps}, lambda found: (found[0], None)
        )
    if residual.dtype != x.dtype:
        return f"residual: {residual.dtype}, x is {x.dtype}"
    args = (x.contiguous(), residual.contiguous(), weight)
    return Invocation("npu", name, args, {"epsilon": eps}, lambda found: (found[0], found[2]))


def swiglu(x: Tensor, chip: Chip) -> Choice:
    """``silu(gate) * up`` of x (..., 2 F)."""
    if "npu_swiglu" not in chip.operators:
        return f"npu_swiglu does not exist on {chip.family}"
    if x.dtype not in _FLOATS or not x.numel():
        return f"x: {x.dtype}, {tuple(x.shape)}; floats, not empty"
    return Invocation("npu", "npu_swiglu", (x.contiguous(),), {"dim": -1}, lambda found: found)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool, chip: Chip) -> Choice:
    """``x`` (N, heads, D) turned by the rows ``positions`` of cos and sin (max_position, D / 2).

    In float32, as its cosines would otherwise be rounded to x's dtype.
    """
    if "npu_rotary_mul" not in chip.operators:
        return f"npu_rotary_mul does not exist on {chip.family}"
    rows, heads, dim = x.shape
    if 2 * cos.shape[1] != dim:
        return f"cos: {2 * cos.shape[1]} of {dim} dimensions turn, npu_rotary_mul turns all"
    if dim >= 896 or heads >= 1000 or not rows:
        return f"x: {tuple(x.shape)}, rows of fewer than 1000 heads of fewer than 896, and at least one"
    if interleaved and chip.family in ("910a", "310p"):
        return f"interleaved: not on {chip.family}"
    if chip.family in ("910a", "310p") and dim != 128:
        return f"head_dim: {dim}, {chip.family} takes 128"
    index = positions.clamp(0, cos.shape[0] - 1)

    def widen(t: Tensor) -> Tensor:
        found = t.index_select(0, index).float()
        wide = found.repeat_interleave(2, 1) if interleaved else torch.cat((found, found), 1)
        return wide[None, :, None].contiguous()

    mode = "interleave" if interleaved else "half"
    # Four dimensions are wanted: BSND with one sequence.
    args = (x.float().contiguous()[None], widen(cos), widen(sin))
    return Invocation(
        "npu", "npu_rotary_mul", args, {"rotary_mode": mode}, lambda found: found[0].to(x.dtype)
    )


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, kv_layout: str, chip: Chip
) -> Choice:
    """Writes k and v (N, Hkv, D) into the pages at ``slots``; negative slots are left out."""
    nz = kv_layout == "npu_nz"
    name = "_npu_reshape_and_cache" if chip.kv_layout == "npu_nz" else "npu_scatter_pa_kv_cache"
    if name not in chip.operators:
        return f"{name} does not exist on {chip.family}"
    if kv_layout != chip.kv_layout:
        return f"kv_layout: {kv_layout!r}, {chip.family} keeps {chip.kv_layout} pages"
    if {k.dtype, v.dtype, k_cache.dtype, v_cache.dtype} != {k.dtype} or k.dtype not in _HALVES:
        return f"dtypes: {k.dtype} into {k_cache.dtype}, one of float16 and bfloat16 for all"
    if nz and (k.shape != v.shape or k.shape[1:].numel() % 16):
        return f"k, v: {tuple(k.shape)} and {tuple(v.shape)}, equal and of 16 values to a fractal row"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return (
            f"k_cache, v_cache: strides {k_cache.stride()} and {v_cache.stride()}, contiguous ones are taken"
        )
    if not slots.numel():
        return "slots: empty"
    if any(s < 0 for s in host(slots)):
        keep = (slots >= 0).nonzero().flatten()
        if not keep.numel():
            return "slots: none is written"
        k, v, slots = k[keep], v[keep], slots[keep]
    caches = (nz_view(k_cache), nz_view(v_cache)) if nz else (k_cache, v_cache)
    args = (k.contiguous(), v.contiguous(), *caches, slots.to(torch.int32))
    kwargs: dict[str, Any] = {} if nz else {"cache_mode": "Norm"}
    return Invocation("atb" if nz else "npu", name, args, kwargs, _nothing)


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    mins: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    chip: Chip,
) -> Choice:
    """``x @ (scales * codes)^T + bias`` for int8 codes (out, in), scales (out, groups), no copies.

    int4 weights would need a second copy in CANN's packing; they stay with our kernel.
    """
    name = "npu_weight_quant_batchmatmul"
    if name not in chip.operators:
        return f"{name} does not exist on {chip.family}"
    (rows, inn), out = x.shape, codes.shape[0]
    if x.dtype not in _HALVES or scales.dtype != x.dtype:
        return f"x: {x.dtype}, scales {scales.dtype}; one of float16 and bfloat16 for both"
    if mins is not None:
        return "mins: an offset in units of the scale would have to be rounded"
    if not rows or max(inn, out) > 65535:
        return f"x, codes: {tuple(x.shape)} and {tuple(codes.shape)}, not empty and at most 65535"
    grouped = scales.shape[1] > 1
    if grouped and (group_size % 32 or group_size > inn - 1):
        return f"group_size: {group_size}, a multiple of 32 below {inn}"
    kwargs: dict[str, Any] = {"antiquant_group_size": group_size if grouped else 0}
    if bias is not None:
        kwargs["bias"] = bias.to(x.dtype if x.dtype == torch.float16 else torch.float32)
    return Invocation("npu", name, (x.contiguous(), codes.t(), scales.t()), kwargs, _same)


def _nothing(found: Any) -> None:
    return None


_same: Callable[[Any], Any] = lambda found: found  # noqa: E731
