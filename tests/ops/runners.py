"""What every op is run on: plain torch, and the native kernels of each instruction set of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn import native
from fastattn.backends import cpu_ops, torch_ops
from fastattn.spec import Op

RUNNERS = ("torch", *(f"cpu-{isa}" for isa in native.available_isas()))
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def table(runner: str) -> Mapping[str, Op]:
    """The ops of a runner; a native one forces its instruction set until `native.set_isa` is called."""
    if runner == "torch":
        return torch_ops.OPS
    native.set_isa(runner.removeprefix("cpu-"))
    return cpu_ops.OPS


def run(ops: Mapping[str, Op], name: str, args: Any) -> Any:
    """Runs an op as dispatch would: only when nothing speaks against it."""
    op = ops[name]
    assert args.features() <= op.features
    assert op.reasons(args.signature()) == []
    return op.run(args)


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).abs().max()) if exact.numel() else 0.0


def assert_accurate(ours: Tensor, same_dtype: Tensor, exact: Tensor) -> None:
    """Twice the error of torch's maths in the same dtype, plus one rounding of the largest value."""
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all()
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    limit = 2 * error(same_dtype, exact) + torch.finfo(ours.dtype).eps * largest
    assert error(ours, exact) <= limit


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)
