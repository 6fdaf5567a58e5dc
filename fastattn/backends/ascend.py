"""Triton-Ascend kernels and CANN operators for Ascend NPUs."""

from __future__ import annotations

from importlib.util import find_spec

from ..spec import Backend


def _available() -> list[str]:
    reasons = ["this version of fastattn has no Ascend kernels yet"]
    if find_spec("torch_npu") is None:
        reasons.append("torch_npu is not installed")
    return reasons


BACKEND = Backend("ascend", ("npu",), _available, ops=dict, describe=dict)
