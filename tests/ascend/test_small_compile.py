"""The small kernels through triton-ascend and the vendor's planner, and from their lowered IR on this CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_ops.toolchain.client import call_all
from ascend_ops.toolchain.instances import recording

from .conftest import ROOT
from .small_calls import calls, launch

pytestmark = pytest.mark.toolchain
TARGETS = ("Ascend910B3", "Ascend910_9391")


def test_planner_accepts_every_kernel(vendor_python: Path) -> None:
    """For 910B and A3, at the sizes of a 7B model, with double buffers."""
    distinct: dict[Any, str] = {}
    for name, (op, args) in calls().items():
        with recording() as seen:
            launch(op, args)
        assert seen, name
        distinct |= dict.fromkeys(seen, name)
    requests = [i.planning(*TARGETS) for i in distinct]
    answers = call_all(vendor_python, [ROOT], "ascend_ops.toolchain.worker:plan_kernel", requests)
    for name, answer in zip(distinct.values(), answers, strict=True):
        for target in TARGETS:
            plan = answer[target]
            assert plan["accepted"], f"{name} on {target}: {plan['overflow']} {plan['error']}"
            assert not plan["retried"], f"{name} on {target} lost its double buffers"


RUN = (
    "norm with residual", "gate", "rotary of pairs", "append with rotary", "linear int4 of 128, 1 rows",
    "linear int4 with act-order, 70 rows", "linear int8 of 128, 70 rows", "embedding int4 of 32",
)  # fmt: skip


def test_lowered_kernels_are_right(vendor_python: Path) -> None:
    """What the vendor's front end made of the kernels, compiled for this CPU, against the oracle."""
    function = "tests.ascend.small_calls:check_lowered"
    answers = call_all(vendor_python, [ROOT], function, [{"name": name} for name in RUN])
    for name, found in zip(RUN, answers, strict=True):
        limit = 2 * found["torch"] + torch.finfo(torch.float16).eps * max(1.0, found["largest"])
        assert found["ours"] <= limit, (name, found)
