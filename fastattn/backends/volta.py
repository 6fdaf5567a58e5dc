"""CUDA kernels for Volta and Turing (sm_70, sm_72, sm_75), from `cuda_volta`; small ops: `volta_ops`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..devices import lacks_code
from ..indices import check_indices
from ..settings import settings
from ..spec import AttentionArgs, AttentionSignature, Backend, Op

_EMULATED = "volta" in settings.emulate
_MASKS = (None, torch.bool, torch.float16, torch.float32)


def device_reasons(device: torch.device) -> list[str]:
    """Why the kernels, or torch's own beside them, do not run on this one of several devices."""
    from cuda_volta import runtime

    reasons = runtime.against(device) if isinstance(device, torch.device) else []
    if not reasons and device.type == "cuda" and (lack := lacks_code(device)):
        return [lack]
    return reasons


def dtype_reasons(dtype: torch.dtype, what: str = "dtype") -> list[str]:
    """Why the kernels do not compute in this data type."""
    if dtype == torch.float16:
        return []
    if dtype == torch.bfloat16:
        return [f"{what} torch.bfloat16: Volta has no bfloat16; convert with .half(), or --dtype float16"]
    return [f"{what} {dtype}, it takes torch.float16"]


def _attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    """(out, lse), lse empty unless asked for. Indices on a GPU are clamped to the memory that exists.

    Raises ValueError for a length or page out of range that the host can see.
    """
    from cuda_volta.attention import attention
    from cuda_volta.attention_params import AttentionCall

    if a.q.device.type == "cpu":
        check_indices(a)
    return attention(AttentionCall(**{name: getattr(a, name) for name in AttentionCall._fields}))


def _attention_reasons(s: AttentionSignature) -> list[str]:
    from cuda_volta import runtime
    from cuda_volta.attention import widest_head_dim

    reasons = device_reasons(s.device) + dtype_reasons(s.dtype)
    widest = widest_head_dim(runtime.shared_bytes(s.device))
    if s.kv_dtype != s.dtype:
        reasons += dtype_reasons(s.kv_dtype, "k and v are")
    for name, size in (("head_dim", s.head_dim), ("head_dim of v", s.v_head_dim)):
        if size > widest:
            reasons.append(f"{name} {size}, it takes at most {widest}")
    if s.mask_dtype not in _MASKS:
        reasons.append(f"attn_mask is {s.mask_dtype}, it takes bool, float16 and float32")
    return reasons


def _available() -> list[str]:
    from cuda_volta import runtime

    runtime.use_ptx(settings.volta_ptx)
    if _EMULATED:
        return runtime.against(torch.device("cpu"))
    if not torch.cuda.is_available():
        return ["torch sees no NVIDIA GPU (FASTATTN_EMULATE=volta runs the kernels on the CPU)"]
    reasons = {i: device_reasons(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
    return [] if not all(reasons.values()) else [f"cuda:{i}: {'; '.join(why)}" for i, why in reasons.items()]


def _ops() -> Mapping[str, Op]:
    from . import volta_ops

    features = frozenset(AttentionArgs._field_defaults) - {"kv_layout"}
    return {"attention": Op(_attention, features, _attention_reasons), **volta_ops.OPS}


def _describe() -> Mapping[str, str]:
    from cuda_volta import runtime

    kind = "cpu" if _EMULATED else "cuda"
    return runtime.describe(kind)


BACKEND = Backend("volta", ("cuda", "cpu") if _EMULATED else ("cuda",), _available, _ops, _describe)
