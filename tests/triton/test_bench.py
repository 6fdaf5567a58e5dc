"""The benchmarks on a GPU: refused without one, and with one a short run of each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .calls import DEVICE

pytestmark = pytest.mark.toolchain

BENCH = Path(__file__).parents[2] / "bench"
PROGRAMS = {
    "attention.py": ["--suite", "gpu", "--only", "keys=8192", "--shorten", "16"],
    "quant.py": ["--rows", "1,16", "--data_type", "fp16", "--format", "int4-128", "--shape", "1024x1024"],
    "small_ops.py": ["--rows", "64", "--hidden", "1024"],
}


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / program), "--device", "cuda", "--seconds", "0.1", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here")
@pytest.mark.parametrize("program", PROGRAMS)
def test_without_a_gpu(program: str) -> None:
    done = run(program)
    assert done.returncode == 1
    assert "--device cuda: torch sees none" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("program", PROGRAMS)
def test_on_a_gpu(program: str, tmp_path: Path) -> None:
    done = run(program, *PROGRAMS[program], "--json", str(tmp_path / "records.json"))
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "records.json").read_text())
    assert records
    assert all(r["ours"] > 0 and r["limit_value"] > 0 and "gpu" in r["env"] for r in records)
