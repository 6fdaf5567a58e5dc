"""Random weights of every in-memory format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.quant import packed
from fastattn.spec import PackedWeight

#: Kinds of quantized weights, as options of `make` (its format is the first word).
QUANTIZED: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4 g16": {"group": 16},
    "int4 g128 float32": {"group": 128, "scale_dtype": torch.float32},
    "int4 cut at 32": {"group": 64, "offset": 32},
    "int4 cut at 16": {"group": 64, "offset": 16},
    "int4 cut at 5": {"offset": 5},
    "int4 g_idx": {"g_idx": True},
    "int4 x_perm bias": {"x_perm": True, "bias": torch.float32},
    "int8": {},
    "int8 no mins": {"mins": False},
    "int8 g16 float32": {"group": 16, "scale_dtype": torch.float32, "mins": False},
    "int8 cut at 7 bias": {"group": 48, "offset": 7, "bias": torch.float16},
    "int8 g_idx x_perm": {"g_idx": True, "x_perm": True},
}


def make(
    fmt: str,
    out: int,
    inn: int,
    *,
    seed: int = 0,
    group: int = 32,
    offset: int = 0,
    scale_dtype: torch.dtype = torch.float16,
    mins: bool = True,
    g_idx: bool | str = False,
    x_perm: bool = False,
    bias: torch.dtype | None = None,
) -> PackedWeight:
    """``fmt``: "int4", "int8" or a float dtype's name for a dense matrix. ``g_idx``: any, or "runs"."""
    rng = torch.Generator().manual_seed(seed)
    b = None if bias is None else torch.randn(out, generator=rng).to(bias)
    perm = torch.randperm(inn, generator=rng) if x_perm else None
    if not fmt.startswith("int"):
        weight = torch.randn(out, inn, generator=rng).to(getattr(torch, fmt))
        return packed.dense(weight, b)._replace(x_perm=perm)
    groups = max(1, (inn + offset + group - 1) // group)
    index = torch.randint(0, groups, (inn,), generator=rng, dtype=torch.int32) if g_idx else None
    if index is not None and g_idx == "runs":
        index = index.sort().values
    scales = (torch.rand(out, groups, generator=rng) * 0.1 + 0.01).to(scale_dtype)
    low = (torch.randn(out, groups, generator=rng) * 0.3).to(scale_dtype) if mins or fmt == "int4" else None
    options = {"group_offset": offset, "g_idx": index, "x_perm": perm, "bias": b}
    if fmt == "int4":
        assert low is not None
        q = torch.randint(0, 16, (out, inn), generator=rng, dtype=torch.uint8)
        return packed.pack_int4(q, scales, low, group, **options)
    q = torch.randint(-128, 128, (out, inn), generator=rng)
    return packed.pack_int8(q, scales / 16, low, group, **options)


def same(a: PackedWeight, b: Tensor) -> bool:
    """Whether a weight is exactly this float64 matrix."""
    return torch.equal(packed.dequantize(a, torch.float64), b)
