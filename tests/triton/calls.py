"""Calls of the Triton backend: on a GPU if there is one, else on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.attention import build_args
from fastattn.spec import AttentionArgs

from ..api.cases import Case, assert_accurate, torch_math
from ..emulation import device_present

DEVICE = "cuda" if device_present("triton") else "cpu"


def on_device(value: Any) -> Any:
    """A tensor on `DEVICE` with the same strides; anything else as it is."""
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def device_args(case: Case) -> AttentionArgs:
    """The case's record on the device."""
    options = {name: on_device(value) for name, value in case.options.items()}
    return build_args(on_device(case.q), on_device(case.k), on_device(case.v), **options)


def check(case: Case) -> None:
    """Runs the case through `fastattn.attention` and asserts that it is accurate."""
    options = {name: on_device(value) for name, value in case.options.items()}
    q, k, v = (on_device(t) for t in (case.q, case.k, case.v))
    result = fastattn.attention(q, k, v, **options, backend="triton")
    assert_matches(case, *(result if case.options.get("return_lse") else (result, None)))


def assert_matches(case: Case, out: Tensor, lse: Tensor | None) -> None:
    """Asserts the accuracy rule, against the oracle on the CPU."""
    args = case.args()
    exact, exact_lse = reference.attention(args)
    yardstick, yardstick_lse = torch_math(args)
    assert out.dtype == case.q.dtype
    assert_accurate(out.cpu(), yardstick, exact, f"triton {case}")
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_accurate(lse.cpu(), yardstick_lse, exact_lse, f"triton lse {case}")
