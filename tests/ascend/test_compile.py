"""Every kernel instantiation of the tile table, through triton-ascend and the vendor's planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_ops.attention import attention
from ascend_ops.capacity import PrefillShape, single_buffered
from ascend_ops.chips import CHIPS
from ascend_ops.planner import PrefillTiles
from ascend_ops.toolchain.client import ToolchainError, Worker, call_all
from ascend_ops.toolchain.instances import recording
from ascend_ops.toolchain.table import CALLS_950, HEADER, TARGET_950, TARGETS, plans, row

from .conftest import ROOT

pytestmark = pytest.mark.toolchain

PLAN = "ascend_ops.toolchain.worker:plan_kernel"


def request(
    tiles: PrefillTiles, head_dim: int, chips: tuple[str, ...] = TARGETS, **options: Any
) -> dict[str, Any]:
    """The planning of one causal prefill kernel."""
    q = torch.empty(1, 64, 2, head_dim, dtype=torch.float16)
    with recording() as seen:
        attention(q, q, q, scale=1.0, tiles=tiles, return_lse=True, **{"causal": True, **options})
    (kernel,) = seen
    return kernel.planning(*chips)


@pytest.mark.parametrize(
    ("number", "targets", "only"), [(0, TARGETS, None), (1, (TARGET_950,), CALLS_950)], ids=["910", "950"]
)
def test_tile_tables(
    vendor_python: Path, number: int, targets: tuple[str, ...], only: tuple[str, ...] | None
) -> None:
    """Accepted for 910B, A3 and 950 at the first try; memories, workspace, syncs as docs/ascend.md says."""
    documented = (ROOT / "docs" / "ascend.md").read_text().split(HEADER[0])[1:]
    table = documented[number].split("\n\n")[0].splitlines()[2:]
    found = plans(vendor_python, ROOT, *targets, only=only)
    for call, kernel, planned in found:
        for target in targets:
            plan = planned[target]
            assert plan["accepted"], f"{call} {kernel} on {target}: {plan['overflow']} {plan['error']}"
            assert not plan["retried"], f"{call} {kernel} on {target} lost its double buffers"
            assert row(call, kernel, plan) == row(call, kernel, planned[targets[0]])
    assert [row(call, kernel, planned[targets[0]]) for call, kernel, planned in found] == table


def test_oversized_tiles_are_refused_alike(vendor_python: Path) -> None:
    """Planner and compiler name the same memories and the same bytes."""
    tiles = [((128, 512, 128), 128), ((256, 256, 128), 128), ((64, 1024, 128), 256), ((128, 128, 128), 256)]
    answers = call_all(
        vendor_python, [ROOT], PLAN, [request(PrefillTiles(*t), d, ("Ascend910B3",)) for t, d in tiles]
    )
    for (tile, head_dim), answer in zip(tiles, answers, strict=True):
        plan = answer["Ascend910B3"]
        ours = single_buffered(PrefillShape(*tile, head_dim, head_dim, 2.0)).overflows(CHIPS["Ascend910B3"])
        assert not plan["accepted"]
        assert {memory: tuple(pair) for memory, pair in plan["overflow"].items()} == ours


def test_larger_blocks_cross_less_often(vendor_python: Path) -> None:
    """Each block costs the same synchronisations, so that four times the keys are a quarter of them."""
    sizes = (128, 256, 512)
    answers = call_all(
        vendor_python, [ROOT], PLAN, [request(PrefillTiles(64, n, 128), 128, ("Ascend910B3",)) for n in sizes]
    )
    syncs = [answer["Ascend910B3"]["syncs"] for answer in answers]
    assert all(s == syncs[0] for s in syncs)
    assert set(syncs[0]) == {"aic", "aiv"}
    assert all(count > 0 for counts in syncs[0].values() for count in counts)


def test_worker_reports_errors(vendor_python: Path) -> None:
    """A failing call raises with the worker's traceback, and the worker goes on."""
    with Worker(vendor_python, [ROOT]) as worker:
        with pytest.raises(ToolchainError, match="no_such_function"):
            worker.call("ascend_ops.toolchain.worker:no_such_function")
        good = request(PrefillTiles(16, 16, 16), 16, ("Ascend910B3",))
        assert worker.call(PLAN, **good)["Ascend910B3"]["accepted"]
        with pytest.raises(ToolchainError, match="Ascend000"):
            worker.call(PLAN, **{**good, "chips": ["Ascend000"]})
