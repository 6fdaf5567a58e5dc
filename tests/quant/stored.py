"""Random matrices in every format on disk, with the float64 values that the bits of the file mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.quant import awq, gptq, words
from fastattn.quant.awq import Awq
from fastattn.quant.compressed import Compressed
from fastattn.quant.gptq import Gptq
from fastattn.quant.grouped import Format, num_groups, trivial_g_idx
from tests.quant import naive


class Stored(NamedTuple):
    """A matrix (out, in) as it lies on disk."""

    format: Format
    tensors: dict[str, Tensor]
    values: Tensor  # float64, read bit by bit


class Spec(NamedTuple):
    """Which format, of what kind."""

    kind: str  # gptq, awq, compressed-tensors
    bits: int = 4
    group_size: int = 32
    act_order: bool = False
    symmetric: bool = True
    zeros: str = "v1"
    scale_dtype: torch.dtype = torch.float16

    def __str__(self) -> str:
        kind = f"{self.kind}-{self.zeros}" if self.kind == "gptq" else self.kind
        flags = ("-act" if self.act_order else "") + ("" if self.symmetric else "-asym")
        return f"{kind}-{self.bits}b-g{self.group_size}{flags}"


SPECS = [
    *(Spec("gptq", bits, 32, act, sym, zeros) for bits in words.BITS for act in (False, True)
      for sym, zeros in ((True, "v1"), (False, "v1"), (False, "v2"))),
    *(Spec("gptq", 4, group, act) for group in (64, 128, -1) for act in (False, True)),
    *(Spec("awq", 4, group, symmetric=False) for group in (32, 128, -1)),
    *(Spec("compressed-tensors", bits, 32, act, sym) for bits in (4, 8) for act in (False, True)
      for sym in (False, True)),
    Spec("compressed-tensors", 4, -1),
    Spec("compressed-tensors", 4, 64, True, False, scale_dtype=torch.bfloat16),
    Spec("compressed-tensors", 2, 16, scale_dtype=torch.float32),
]  # fmt: skip


def store(spec: Spec, out: int, inn: int, seed: int, g_idx: Tensor | None = None) -> Stored:
    """A random matrix; ``g_idx`` stands for a random one with act-order."""
    rng = torch.Generator().manual_seed(seed)
    groups, half = num_groups(inn, spec.group_size), 1 << (spec.bits - 1)
    q = torch.randint(0, 1 << spec.bits, (out, inn), generator=rng)
    zero = torch.randint(0, 1 << spec.bits, (out, groups), generator=rng)
    if spec.symmetric:
        zero = torch.full_like(zero, half)
    scales = ((torch.rand(out, groups, generator=rng) + 0.25) / (half * inn**0.5)).to(spec.scale_dtype)
    if g_idx is None:
        g_idx = trivial_g_idx(inn, spec.group_size)
        if spec.act_order:
            g_idx = g_idx[torch.randperm(inn, generator=rng)]
    tensors: dict[str, Tensor]
    if spec.kind == "gptq":
        tensors = gptq.pack(q, scales, zero, g_idx, spec.bits, spec.zeros)._asdict()
        v1 = spec.zeros == "v1"
        values = naive.gptq(tensors, spec.bits, out, inn, v1=v1, group_size=spec.group_size)
        return Stored(Gptq(spec.bits, spec.group_size, spec.act_order, spec.zeros), tensors, values)
    if spec.kind == "awq":
        tensors = {
            "qweight": awq.pack(q.t()), "qzeros": awq.pack(zero.t()), "scales": scales.t().contiguous(),
        }  # fmt: skip
        return Stored(Awq(spec.group_size), tensors, naive.awq(tensors, out, inn, group_size=spec.group_size))
    tensors = {
        "weight_packed": words.pack(q, spec.bits, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor([out, inn]),
    }
    if not spec.symmetric:
        tensors["weight_zero_point"] = words.pack(zero, spec.bits, 0)
    if spec.act_order:
        tensors["weight_g_idx"] = g_idx
    values = naive.compressed(tensors, spec.bits, group_size=spec.group_size)
    kind = Compressed(spec.bits, spec.group_size, spec.act_order, spec.symmetric)
    return Stored(kind, tensors, values)
