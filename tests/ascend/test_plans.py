"""What is read of a plan's text: synchronisations a block, and the row of a refusal."""

from __future__ import annotations

from typing import Any

import pytest

from ascend_ops.toolchain import table
from ascend_ops.toolchain.instances import Instance
from ascend_ops.toolchain.plan import Plan, read_plan
from ascend_ops.toolchain.table import CALLS_950, HEADER, row

SET, WAIT = "  hivm.hir.sync_block_set[x]", "  hivm.hir.sync_block_wait[x]"


def syncs(*blocks: tuple[int, tuple[str, ...], str]) -> tuple[int, ...]:
    """Of a Cube's function of these basic blocks: (number, lines, terminator)."""
    lines = ["func.func @kernel_mix_aic(%0: i64) {"]
    for number, inside, end in blocks:
        lines += [f"^bb{number}(%a: i64):" if number else "", *inside, f"  cf.{end}"]
    return read_plan("\n".join([*lines, "}"]), "", retried=False).syncs["aic"]


def test_a_loop_without_synchronisations_hides_none() -> None:
    """Basic blocks 2 to 4 are the loop over keys, in it 3 a loop of copies; 1 to 5 are that over tiles."""
    assert syncs(
        (0, (), "br ^bb1"),
        (1, (), "br ^bb2"),
        (2, (SET, WAIT, SET), "br ^bb3"),
        (3, (), "cond_br %c, ^bb3, ^bb4"),
        (4, (WAIT,), "cond_br %c, ^bb2, ^bb5"),
        (5, (), "cond_br %c, ^bb1, ^bb6"),
        (6, (), "br ^bb6"),
    ) == (4,)


def test_a_trip_takes_one_side_of_a_branch() -> None:
    assert syncs(
        (0, (), "br ^bb1"),
        (1, (SET,), "cond_br %c, ^bb2, ^bb3"),
        (2, (SET, WAIT), "br ^bb4"),
        (3, (SET,), "br ^bb4"),
        (4, (WAIT,), "cond_br %c, ^bb1, ^bb5"),
        (5, (), "br ^bb5"),
    ) == (4,)


def test_a_refusal_is_a_row() -> None:
    kernel = Instance("prefill:prefill_kernel", (), (("BLOCK_Q", 64), ("BLOCK_K", 512)))
    refused = Plan(False, True, {"UB": (394496, 253952)}, {}, 0, {}, {})._asdict()
    line = row("causal", kernel, refused)
    assert line == "| causal | prefill | 64 x 512 | refused: UB 385.2 K of 248.0 K | | | | |"
    assert line.count("|") == HEADER[0].count("|")
    crashed = Plan(False, True, {}, {}, 0, {}, {}, "error: it crashed\nmore")._asdict()
    assert "| refused: error: it crashed | |" in row("causal", kernel, crashed)


@pytest.mark.parametrize(("chip", "only"), [("Ascend950DT_9581", CALLS_950), ("Ascend910B3", None)])
def test_every_950_has_the_table_of_its_compiler(
    chip: str, only: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(table, "plans", lambda *of, only: asked.append((of[-1], only)) or [])
    monkeypatch.setattr("sys.argv", ["table", "--python", "python", "--chip", chip])
    table.main()
    assert asked == [(chip, only)]
