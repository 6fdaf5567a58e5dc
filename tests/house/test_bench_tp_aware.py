"""bench/tp_aware.py: arguments, and short real runs on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tp_aware as bench
from lib.tp_pair import Pair

from .test_bench import FIELDS, run_program


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    a = bench.parser().parse_args(["--shape", "granite-20b,256x384x128", "--rows", "1,3", "--ranks", "2"])
    assert a.shape == (Pair(6144, 24576, 6144), Pair(256, 384, 128))
    assert (a.rows, a.ranks, a.link) == ((1, 3), (2,), (None,))
    for bad in ("--shape llama", "--shape 256x384", "--shape 256x384x100", "--rows 0", "--link fast"):
        with pytest.raises(SystemExit):
            bench.parser().parse_args(bad.split())
        assert "expected" in capsys.readouterr().err


@pytest.mark.slow
def test_program(tmp_path: Path) -> None:
    out = tmp_path / "pair.json"
    line = "--shape 256x512x256 --rows 1,20 --ranks 1,2 --budget 0.1"
    run_program("tp_aware.py", *line.split(), "--json", str(out))
    written = json.loads(out.read_text())
    assert all(set(r) == FIELDS and r["claim"] == "measured" for r in written)
    cases = {r["case"] for r in written}
    assert cases == {f"256x512x256 ranks={n} local rows={m}" for n in (1, 2) for m in (1, 20)}
    metadata = [r for r in written if r["unit"] == "bytes" and "ranks=2" in r["case"]]
    assert all(r["ratio"] > 2 for r in metadata)  # half of the groups, and no order
    assert {r["peer"] for r in written} == {"naive", "local sort", "their own ms"}
