"""CUDA kernels for Volta (sm_70, sm_72)."""

from __future__ import annotations

import torch

from ..spec import Backend


def _available() -> list[str]:
    reasons = ["this version of fastattn has no Volta kernels yet"]
    if not torch.cuda.is_available():
        reasons.append("torch sees no NVIDIA GPU")
    elif torch.cuda.get_device_capability() not in ((7, 0), (7, 2)):
        reasons.append(f"compute capability {torch.cuda.get_device_capability()}, it needs 7.0 or 7.2")
    return reasons


BACKEND = Backend("volta", ("cuda",), _available, ops=dict, describe=dict)
