"""bench/ascend.py: its counts, the statement that it replaces, and a run of what needs no compiler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ascend as bench_ascend
import ascend_ops.kernels
from ascend_ops.planner import PrefillTiles


@pytest.mark.parametrize("tiles", [(16, 32, 16), (32, 32, 32), (64, 128, 32), (16, 16, 16)])
@pytest.mark.parametrize("keys", [1, 31, 200, 513])
def test_blocks_cover_what_a_causal_head_sees(tiles: tuple[int, int, int], keys: int) -> None:
    """Counted block by block: full ones while the tile's first query sees them whole, edges for the rest."""
    full = edge = 0
    for first in range(0, keys, tiles[0]):
        at, end = 0, min(keys, first + tiles[0])
        while at + tiles[1] <= first + 1:
            at, full = at + tiles[1], full + 1
        while at < end:
            at, edge = at + tiles[2], edge + 1
    assert bench_ascend.blocks_of_head(PrefillTiles(*tiles), keys) == (full, edge)


def test_the_kernel_has_the_statement_that_is_replaced() -> None:
    source = (Path(ascend_ops.kernels.__file__).parent / "prefill.py").read_text()
    assert source.count(bench_ascend.LOADED) == 1


def test_without_a_compiler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask's bytes and the balance are shown, the rest is said to be missing."""
    report = tmp_path / "records.json"
    monkeypatch.setattr("sys.argv", ["ascend.py", "--python", str(tmp_path / "none"), "--json", str(report)])
    bench_ascend.main()
    shown = capsys.readouterr()
    assert "left out" in shown.err
    assert "not run on an NPU" in shown.out
    records = json.loads(report.read_text())
    assert {r["claim"] for r in records} == {"measured", "modelled"}
    assert all(r["ratio"] >= 1 for r in records)


def test_a_950_has_other_rules(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of its blocks crosses through global memory: what is modelled here is not of it."""
    assert bench_ascend.parser().parse_args(["--chip", "Ascend910B3"]).chip == "Ascend910B3"
    with pytest.raises(SystemExit):
        bench_ascend.parser().parse_args(["--chip", "Ascend950PR_9579"])
    assert "invalid choice: 'Ascend950PR_9579'" in capsys.readouterr().err
