"""Triton kernels for sm_75 and newer NVIDIA GPUs."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ..spec import Backend


def _available() -> list[str]:
    reasons = ["this version of fastattn has no Triton kernels yet"]
    if find_spec("triton") is None:
        reasons.append("Triton is not installed (pip install fastattn[triton])")
    if not torch.cuda.is_available():
        reasons.append("torch sees no NVIDIA GPU")
    elif torch.cuda.get_device_capability() < (7, 5):
        reasons.append(f"compute capability {torch.cuda.get_device_capability()}, it needs 7.5")
    return reasons


BACKEND = Backend("triton", ("cuda",), _available, ops=dict, describe=dict)
