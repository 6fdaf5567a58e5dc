"""Whole models through the backend `ascend`, interpreted: the CPU's tokens, and no op that fell back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn import cli, dispatch
from fastattn.models.load import load
from tests.models.builders import hf_model, save_hf
from tests.models.quantized import save_quantized
from tests.quant.stored import Spec

pytestmark = [pytest.mark.emulate("ascend"), pytest.mark.toolchain]
ROOT = Path(__file__).parents[2]
PROMPTS = ("The quick brown fox jumps over the lazy dog", "In the")
OPS = {"embedding", "rms_norm", "linear", "rotary", "append_kv", "attention", "swiglu"}


@pytest.fixture(params=["float16", "int4 with act-order"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random Llama of two layers."""
    model = hf_model("llama", dtype=torch.float16)
    if request.param == "float16":
        save_hf(model, tmp_path / "model")
    else:
        save_quantized(model, tmp_path / "model", Spec("gptq", 4, 32, act_order=True))
    return tmp_path / "model"


def generate(directory: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What `fastattn generate` completes, greedily."""
    prompts = [word for p in PROMPTS for word in ("--prompt", p)]
    arguments = ["--max-tokens", "4", "--ignore-eos", "--dtype", "float16", "--backend", backend, "--json"]
    capsys.readouterr()
    assert cli.main(["generate", str(directory), *prompts, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    return [c["token_ids"] for c in found["completions"]]


def test_generate_equals_the_cpu(directory, capsys):
    expected = generate(directory, "cpu", capsys)
    dispatch.calls.clear()
    assert generate(directory, "ascend", capsys) == expected
    assert {backend for backend, _ in dispatch.calls} == {"ascend"}
    assert {op for _, op in dispatch.calls} == OPS


def test_logits_equal_the_cpus(directory):
    """Closer than tokens: every logit of a prompt, to what two float16 computations may differ by."""
    model = load(str(directory), dtype="float16")
    ids = list(range(3, 20))
    with torch.inference_mode():
        with dispatch.use_backend("cpu"):
            expected = model.logits([ids])[0]
        with dispatch.use_backend("ascend"):
            ours = model.logits([ids])[0]
    assert float((ours - expected).abs().max()) <= 0.02 * float(expected.abs().max())


@pytest.mark.parametrize("directory", ["float16"], indirect=True)
def test_benchmark_runs_on_it(directory, tmp_path):
    """bench/llm.py, unchanged, with FASTATTN_BACKEND=ascend."""
    records = tmp_path / "records.json"
    arguments = {"--model": directory, "--batch_size": 1, "--input_len": 4, "--output_len": 2, "--warmup": 1,
                 "--tensor_para_size": 1, "--iterations": 1, "--chat": "", "--json": records,
                 "--inference_data_type": "fp16"}  # fmt: skip
    words = [str(w) for pair in arguments.items() for w in pair]
    environ = os.environ | {
        "FASTATTN_EMULATE": "ascend",
        "FASTATTN_BACKEND": "ascend",
        "TRITON_INTERPRET": "1",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "bench/llm.py", *words],
        env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(records.read_text())
