"""One row of the report: torch_npu's operator and our kernel on the same call, exactness and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import no_compiler
from ..router import Chip, Invocation


class Setting(NamedTuple):
    """Where the matrix runs, and what of it."""

    device: torch.device
    chip: Chip
    runs: int = 20  # timed, of each case
    full: bool = False  # long sequences too
    quick: bool = False  # sizes that an interpreter can do
    operators: bool = True  # torch_npu's
    kernels: bool = True  # ours, if there is a compiler for the chip


class Row(NamedTuple):
    """What is printed of a case; ``right``: whatever ran was as exact as its dtype."""

    name: str
    operator: str
    vendor: str
    ours: str
    right: bool


def row(
    setting: Setting,
    name: str,
    expected: Tensor,
    vendor: Callable[[], Invocation | str],
    result: Callable[[Any], Tensor],
    ours: Callable[[], Tensor] | None,
) -> Row:
    """Runs a case both ways.

    Args:
        expected: float64 on the CPU.
        vendor: the operator's call, or the reason why there is none; a choice is part of what is timed.
        result: what of the operator's outputs is compared.
        ours: our kernel's result; None where there is none.
    """
    operator, theirs, mine, right = "", "not called", "", True
    if setting.operators:
        try:
            choice = vendor()
        except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
            choice, right = failed(failure), False
        theirs = choice if isinstance(choice, str) else ""
        if isinstance(choice, Invocation):
            operator = choice.name
            theirs, right = measure(lambda: result(vendor()()), expected, setting)  # type: ignore[operator]
    if ours is not None and setting.device.type == "npu" and no_compiler(setting.chip):
        mine = no_compiler(setting.chip)
    elif ours is not None and setting.kernels:
        mine, exact = measure(ours, expected, setting)
        right &= exact
    return Row(name, operator, theirs, mine, right)


def measure(run: Callable[[], Tensor], expected: Tensor, setting: Setting) -> tuple[str, bool]:
    """(error and time, whether the error is one of the dtype)."""
    try:
        out = run()
        error = float((out.reshape(expected.shape).cpu().double() - expected).abs().max())
        limit = 4 * torch.finfo(out.dtype).eps * max(1.0, float(expected.abs().max()))
        times = []
        for _ in range(setting.runs):
            start = time.perf_counter()
            run()
            if setting.device.type == "npu":
                getattr(torch, setting.device.type).synchronize()
            times.append(time.perf_counter() - start)
    except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
        return failed(failure), False
    right = error <= limit
    timed = f", {statistics.median(times) * 1e6:.0f} us" if times else ""
    return f"{'' if right else 'WRONG '}{error:.1e}{timed}", right


def failed(failure: Exception) -> str:
    """What a row says of an exception."""
    return f"FAILED {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:120]}"


def same(found: Tensor) -> Tensor:
    """The result of an operator that returns what is compared."""
    return found
