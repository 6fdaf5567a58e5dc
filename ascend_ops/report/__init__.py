"""The report of an NPU's owner: what ran, how exact it was, how long it took; a table to send.

Each case runs on torch_npu's operator, if the router finds one, and on our kernel, if there is a compiler for
the chip; both are compared with float64 on the CPU. What raises is a line too. Whole models are above this
library: `fastattn report`.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any

import torch

from .. import router
from ..router import Chip, chip_of
from . import attention, collective, small
from .measure import Row, Setting, failed

PARTS = {"attention": attention.rows, "other ops": small.rows, "sum over the ranks": collective.rows}


def versions() -> Iterator[str]:
    """Lines that say what this machine is."""
    yield f"{platform.platform()}, Python {platform.python_version()}"
    for package in ("fastattn", "torch", "torch-npu", "triton", "triton-ascend"):
        yield f"{package} {next((d.version for d in distributions(name=package)), 'is not installed')}"


def npu(torch_npu: Any, chip: Chip) -> Iterator[str]:
    """Lines that say what the NPU and its software are."""
    cann = getattr(torch.version, "cann", "unknown")  # where torch_npu notes it
    yield f"{torch_npu.npu.get_device_name()} ({chip.family}), CANN {cann}"
    yield f"operators: {', '.join(sorted(chip.operators))}"


def run(*, full: bool = False, emulate: bool = False) -> int:
    """Prints the report, on rank 0 if there are several; 0 if everything that ran was right.

    ``emulate``: our kernels alone and on CPU tensors, in a process where Triton interprets.
    """
    first = collective.ranks()[0] == 0
    lines = ["# ascend_ops report", "", *(f"- {line}" for line in versions())]
    if emulate:
        setting = Setting(torch.device("cpu"), chip_of("910b"), 0, full, quick=True, operators=False)
        lines += ["- EMULATED: our kernels interpreted on the CPU, no operator of torch_npu"]
    else:
        absent = ""
        try:
            import torch_npu

            absent = "" if torch_npu.npu.is_available() else "torch_npu sees none"
        except ImportError as error:
            absent = str(error)
        if absent:
            print("\n".join(lines), f"\n\nThere is no NPU to report on: {absent}")
            return 1
        torch_npu.npu.set_device(collective.local_rank())
        setting = Setting(torch.device("npu", collective.local_rank()), router.current(), full=full)
        lines += [f"- {line}" for line in npu(torch_npu, setting.chip)]
    everything = True
    if first:
        print("\n".join(lines))
    for part, rows in PARTS.items():
        if first:
            print(f"\n## {part}\n\n| case | torch_npu | error, time | our kernel |\n|---|---|---|---|")
        for row in _rest_failed(part, rows(setting)):
            everything &= row.right
            if first:
                print(f"| {row.name} | {row.operator} | {row.vendor} | {row.ours} |", flush=True)
    if first:
        print("\nAll right." if everything else "\nSOMETHING IS WRONG: see WRONG and FAILED above.")
    return 0 if everything else 1


def _rest_failed(part: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows of a part; what raises between them is the last one."""
    try:
        yield from rows
    except Exception as failure:  # noqa: BLE001 (whatever it is, it belongs into the report)
        yield Row(f"{part}: the rest", "", failed(failure), "", right=False)
