"""Random weights of every in-memory format."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.quant import packed
from fastattn.spec import PackedWeight


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
