"""Runs in the vendor's environment: attention from its kernels' lowered IR, against the oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ascend_ops.attention import attention
from ascend_ops.launch import cpu_executor
from ascend_ops.planner import PrefillTiles
from ascend_ops.toolchain.execute import Lowered
from fastattn import reference

from ..api.cases import Case, assert_accurate, torch_math


def check(
    shape: dict[str, Any], dtype: str, options: dict[str, Any], tiles: list[int] | None = None
) -> dict[str, float]:
    """Asserts the accuracy rule for a call of random values; returns the largest error.

    ``shape`` has q, k and v shapes; lists among the options become int32 tensors.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(shape[name]).to(getattr(torch, dtype)) for name in "qkv")
    tensors = {
        name: torch.tensor(option, dtype=torch.int32)
        if isinstance(option, list) and name != "window"
        else option
        for name, option in options.items()
    }
    for name in ("alibi_slopes", "sinks"):
        if name in tensors:
            tensors[name] = torch.rand(q.shape[-2])
    if "attn_mask" in tensors:
        keep = torch.rand(q.shape[0], 1, q.shape[1], k.shape[1]) > 0.3
        tensors["attn_mask"] = keep if options["attn_mask"] == "bool" else torch.where(keep, 0.5, -torch.inf)
    args = Case(q, k, v, {**tensors, "return_lse": True}).args()
    exact, exact_lse = reference.attention(args)
    yardstick, yardstick_lse = torch_math(args)
    call = {name: value for name, value in args._asdict().items() if name != "kv_layout"}
    with cpu_executor(Lowered):
        out, lse = attention(**call, tiles=PrefillTiles(*tiles) if tiles else None, cores=2)
    assert_accurate(out, yardstick, exact, f"{shape} {options}")
    assert_accurate(lse, yardstick_lse, exact_lse, f"lse {shape} {options}")
    return {"error": error(out, exact), "torch": error(yardstick, exact)}


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max())
