"""Whole models through this backend alone, in the emulator: the same tokens and logits as on `cpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.builders import hf_model, save_hf
from tests.models.quantized import save_quantized
from tests.quant.stored import Spec

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).parents[2]
OPS = {"attention", "append_kv", "rotary", "rms_norm", "swiglu", "linear", "embedding"}
MODELS = ("float16", "int4-act-order")


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    # A head_dim that prefill has a kernel for; the padded ones are tested op by op.
    model = hf_model("llama", seed=3, dtype=torch.float16, head_dim=64)
    if request.param == "float16":
        return save_hf(model, folder)
    save_quantized(model, folder, Spec("gptq", 4, 32, act_order=True))
    return folder


def run(folder: Path, *command: str, emulate: bool) -> tuple[str, Counter[tuple[str, str]]]:
    """What a program writes, and how often each (backend, op) ran in all of its processes."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "counting"), str(ROOT)]),
        "DISPATCH_CALLS": str(calls),
        "FASTATTN_EMULATE": "volta" if emulate else "",
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counted: Counter[tuple[str, str]] = Counter()
    for line in calls.read_text().splitlines():
        for backend, op, count in json.loads(line):
            counted[backend, op] += count
    return done.stdout, counted


def assert_nothing_fell_back(calls: Counter[tuple[str, str]]) -> None:
    assert {backend for backend, _ in calls} == {"volta"}
    assert {op for _, op in calls} == OPS


def test_generate_runs_every_op_here(directory: Path, tmp_path: Path) -> None:
    prompts = ("--prompt", "The quick brown fox", "--prompt", "In the beginning there was a word")
    options = ("--dtype", "float16", "--max-tokens", "6", "--ignore-eos", "--json")
    command = ("-m", "fastattn", "generate", str(directory), *prompts, *options)
    ours, calls = run(tmp_path, *command, emulate=True)
    theirs, cpu_calls = run(tmp_path, *command, emulate=False)
    assert_nothing_fell_back(calls)
    assert {backend for backend, _ in cpu_calls} == {"cpu"}
    tokens = [[c["token_ids"] for c in json.loads(text)["completions"]] for text in (ours, theirs)]
    assert tokens[0] == tokens[1]
    assert [len(t) for t in tokens[0]] == [6, 6]


def test_the_benchmark_runs_every_op_here(directory: Path, tmp_path: Path) -> None:
    sizes = ("--batch_size", "2", "--input_len", "9", "--output_len", "3", "--tensor_para_size", "1")
    runs = ("--iterations", "1", "--warmup", "1", "--inference_data_type", "fp16", "--chat", "")
    command = (str(ROOT / "bench" / "llm.py"), "--model", str(directory), *sizes, *runs)
    out, calls = run(tmp_path, *command, "--json", str(tmp_path / "records.json"), emulate=True)
    assert_nothing_fell_back(calls)
    assert "fp16" in out
    assert json.loads((tmp_path / "records.json").read_text())


LOGITS = """
import sys, torch, fastattn
from fastattn.dispatch import use_backend
model, dtype, backend, out = sys.argv[1:]
with use_backend(backend):
    torch.save(fastattn.load(model, dtype=dtype).logits([list(range(5, 42)), [7]]), out)
"""


def logits(directory: Path, folder: Path, dtype: str, backend: str) -> list[Tensor]:
    out = folder / "logits.pt"
    run(folder, "-c", LOGITS, str(directory), dtype, backend, str(out), emulate=backend == "volta")
    found: list[Tensor] = torch.load(out)
    return found


def test_logits_are_as_exact_as_on_the_cpu(directory: Path, tmp_path: Path) -> None:
    exact = logits(directory, tmp_path, "float32", "cpu")
    ours = logits(directory, tmp_path, "float16", "volta")
    theirs = logits(directory, tmp_path, "float16", "cpu")
    for a, b, oracle in zip(ours, theirs, exact, strict=True):
        limit = 2 * (b.double() - oracle.double()).abs().max() + 2**-10 * oracle.abs().max()
        assert (a.double() - oracle.double()).abs().max() <= limit
