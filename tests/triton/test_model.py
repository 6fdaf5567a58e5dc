"""Whole models through this backend alone: the same tokens and logits as on `cpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import cli, dispatch
from fastattn.dispatch import use_backend

from ..models.builders import hf_model, save_hf
from ..models.quantized import save_quantized
from ..quant.stored import Spec
from .calls import DEVICE

pytestmark = [pytest.mark.emulate("triton"), pytest.mark.toolchain, pytest.mark.gpu]

BENCH = Path(__file__).parents[2] / "bench" / "llm.py"
OPS = {"attention", "append_kv", "rotary", "rms_norm", "swiglu", "linear", "embedding"}


@pytest.fixture(scope="module", params=["float16", "int4-act-order"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("model")
    model = hf_model("llama", seed=3, dtype=torch.float16)
    if request.param == "float16":
        return save_hf(model, folder)
    save_quantized(model, folder, Spec("gptq", 4, 32, act_order=True))
    return folder


def test_generate_runs_every_op_here(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "generate", str(directory), "--prompt", "The quick brown fox", "--prompt", "In the beginning",
        "--dtype", "float16", "--max-tokens", "4", "--ignore-eos", "--json",
    ]  # fmt: skip
    before = dispatch.calls.copy()
    assert cli.main([*command, "--device", DEVICE]) == 0
    ran = dispatch.calls - before
    ours = json.loads(capsys.readouterr().out)["completions"]
    assert {backend for backend, _ in ran} == {"triton"}
    assert {op for _, op in ran} == OPS
    assert cli.main([*command, "--backend", "cpu"]) == 0
    theirs = json.loads(capsys.readouterr().out)["completions"]
    assert [c["token_ids"] for c in ours] == [c["token_ids"] for c in theirs]


def test_logits_are_as_exact_as_on_the_cpu(directory: Path) -> None:
    def logits(backend: str, dtype: str) -> list[torch.Tensor]:
        with use_backend(backend):
            model = fastattn.load(
                str(directory), dtype=dtype, device=DEVICE if backend == "triton" else "cpu"
            )
            return [t.double().cpu() for t in model.logits([list(range(5, 24)), [7]])]

    exact, ours, theirs = logits("cpu", "float32"), logits("triton", "float16"), logits("cpu", "float16")
    for a, b, oracle in zip(ours, theirs, exact, strict=True):
        assert (a - oracle).abs().max() <= 2 * (b - oracle).abs().max() + 2**-10 * oracle.abs().max()


@pytest.mark.skipif(DEVICE == "cuda", reason="bench/llm.py computes on the CPU")
def test_the_benchmark_runs_every_op_here(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FASTATTN_BACKEND lets no other backend run: the benchmark would fail."""
    monkeypatch.setenv("FASTATTN_BACKEND", "triton")
    records = tmp_path / "records.json"
    command = [
        sys.executable, str(BENCH), "--model", str(directory), "--batch_size", "1", "--input_len", "6",
        "--output_len", "2", "--tensor_para_size", "1", "--iterations", "1", "--warmup", "1",
        "--inference_data_type", "fp16", "--chat", "", "--json", str(records),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {r["case"] for r in json.loads(records.read_text())}
