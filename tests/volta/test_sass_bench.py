"""bench/volta.py: arguments, recorded launches, the work its cases count, and a short real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import volta as bench_volta
from cuda_volta import prefill
from lib.records import Record
from lib.volta_cases import CASES, WINDOW
from lib.volta_launch import record

from .sass_code import compiled, needs_cuda_12
from .test_sass_listing import SOURCE

ROOT = Path(__file__).resolve().parents[2]
CASE = {case.name: case for case in CASES}


@pytest.mark.parametrize(
    "line", ["--head-dim 0", "--case causal,nothing", "--cubin x", "--cubin x --macs 5", "--warps two"]
)
def test_bad_arguments(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["volta.py", *line.split()])
    with pytest.raises(SystemExit) as caught:
        bench_volta.main()
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("name", CASE)
@pytest.mark.parametrize("seqlen", [1024, 2048])
def test_blocks_pass_every_pair_that_counts(name: str, seqlen: int) -> None:
    case = CASE[name]
    passed = sum(128 * case.visible(first, 128, seqlen) for first in range(0, seqlen, 128))
    rows, keys = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    call = case.call(seqlen, 64)
    seen = torch.ones(seqlen, seqlen, dtype=torch.bool)
    if call.causal:
        seen &= keys <= rows
    if call.window[0] is not None:
        assert call.window[0] == WINDOW - 1
        seen &= keys >= rows - call.window[0]
    assert case.pairs(seqlen) == int(seen.sum())
    assert int(seen.sum()) <= passed <= int(seen.sum()) + seqlen * 2 * 128


def test_recording_launches_nothing_and_ends() -> None:
    real = prefill.load
    call = CASE["varlen"].call(1024, 64)
    (one,) = record(prefill, lambda: prefill.prefill(call))
    assert one.variant.op == "prefill"
    assert one.launch.grid == (8, 2, 2)
    known = dict(one.launch.memory)
    assert call.cu_seqlens_q is not None
    assert known[call.cu_seqlens_q.data_ptr()] == b"".join(n.to_bytes(4, "little") for n in (0, 1024, 2048))
    assert prefill.load is real
    with pytest.raises(ZeroDivisionError):
        record(prefill, lambda: 1 // 0)
    assert prefill.load is real


@pytest.mark.toolchain
@needs_cuda_12
def test_any_cubin(tmp_path: Path) -> None:
    cubin, _ = compiled(tmp_path, SOURCE)
    command = [sys.executable, "bench/volta.py", "--cubin", str(cubin), "--macs", "1024", "--warps", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "kernel" in done.stdout
    assert "no loop holds HMMA" in done.stdout
    done = subprocess.run(
        [*command, "--kernel", "other"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "--kernel: 'other' matches no kernel" in done.stderr


@pytest.mark.toolchain
@needs_cuda_12
def test_a_short_run(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    line = ["--head-dim", "64", "--case", "plain", "--json", str(file)]
    subprocess.run([sys.executable, "bench/volta.py", *line], cwd=ROOT, check=True, capture_output=True)
    found = [Record(**item) for item in json.loads(file.read_text())]
    assert {r.case for r in found} == {"plain D=64"}
    assert {r.claim for r in found} == {"compiled", "modelled"}
    (bound,) = (r for r in found if r.metric == "pipe bound")
    assert bound.limit_value is not None
    assert bound.limit_value <= bound.ours < 8.2
    speeds = [r.ours for r in found if r.unit == "TFLOP/s"]
    assert all(20 < speed < 125 for speed in speeds)
