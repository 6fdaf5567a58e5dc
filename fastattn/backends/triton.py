"""Triton kernels for sm_75 and newer NVIDIA GPUs, adapted from `triton_ops`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ..indices import check_indices
from ..settings import settings
from ..spec import AttentionArgs, AttentionSignature, Backend, Op
from .interpreter import reasons_against_emulating

_EMULATED = "triton" in settings.emulate
_CAPABILITY = (7, 5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Types that keys and values may be stored in beside q's own, with their scales.
KV_DTYPES = (*DTYPES, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
MAX_HEAD_DIM = 256


def _available() -> list[str]:
    spec = find_spec("triton")
    if spec is None:
        return ["Triton is not installed (pip install fastattn[triton])"]
    # Looked up as a file: to import Triton here would settle whether it interprets.
    folders = map(Path, spec.submodule_search_locations or ())
    if not any((folder / "tools" / "tensor_descriptor.py").is_file() for folder in folders):
        return ["Triton is older than 3.4 and has no tensor descriptors (pip install fastattn[triton])"]
    if _EMULATED:
        return reasons_against_emulating("triton")
    if torch.version.hip is not None:
        return [f"torch is built for ROCm {torch.version.hip}, it needs one built for CUDA"]
    if not torch.cuda.is_available():
        return ["torch sees no NVIDIA GPU (FASTATTN_EMULATE=triton interprets the kernels on the CPU)"]
    best = max(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return [] if best >= _CAPABILITY else [f"compute capability {best}, it needs {_CAPABILITY}"]


def capability(device: torch.device) -> tuple[int, int]:
    """Of the device that a call would run on; the interpreter can do what the newest can."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why no kernel runs there with that data type."""
    have = capability(device)
    if have < _CAPABILITY:
        return [f"{device} has compute capability {have}, it needs {_CAPABILITY}"]
    if dtype not in DTYPES:
        return [f"dtype {dtype}, it takes {', '.join(map(str, DTYPES))}"]
    if dtype == torch.bfloat16 and have < (8, 0):
        return [f"dtype {dtype} needs compute capability (8, 0), {device} has {have}"]
    return []


def _run_attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    from ..triton_ops.attention import attention

    if a.q.device.type == "cpu":
        check_indices(a)
    return attention(a)


def _attention_reasons(s: AttentionSignature) -> list[str]:
    reasons = device_reasons(s.device, s.dtype)
    if s.kv_dtype not in KV_DTYPES:
        reasons.append(f"k and v are {s.kv_dtype}, it takes {', '.join(map(str, KV_DTYPES))}")
    if s.kv_dtype in _FLOAT8 and capability(s.device) < (8, 9):
        reasons.append(f"k and v are {s.kv_dtype}, which needs compute capability (8, 9)")
    if s.mask_dtype not in (None, torch.bool, *DTYPES):
        reasons.append(f"attn_mask is {s.mask_dtype}, it takes bool and {', '.join(map(str, DTYPES))}")
    if max(s.head_dim, s.v_head_dim) > MAX_HEAD_DIM:
        reasons.append(f"head_dim {s.head_dim} of q, {s.v_head_dim} of v, it takes at most {MAX_HEAD_DIM}")
    return reasons


def _ops() -> Mapping[str, Op]:
    features = frozenset(AttentionArgs._field_defaults) - {"kv_layout"}
    from .triton_ops import OPS

    return {"attention": Op(_run_attention, features, _attention_reasons), **OPS}


def _describe() -> Mapping[str, str]:
    import triton

    facts = {"triton": triton.__version__}
    if _EMULATED:
        return facts | {"kernels": "interpreted on the CPU (FASTATTN_EMULATE)"}
    devices = {f"{torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())}
    return facts | {"devices": ", ".join(sorted(devices))}


BACKEND = Backend("triton", ("cuda", "cpu") if _EMULATED else ("cuda",), _available, _ops, _describe)
