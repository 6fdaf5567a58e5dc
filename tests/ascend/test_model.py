"""Whole models through the backend `ascend`, interpreted: the CPU's tokens, and no op that fell back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from ascend_ops.router import Invocation, chip_of
from ascend_ops.router.validate import faults
from fastattn import cli, dispatch
from fastattn.backends import ascend, ascend_small
from fastattn.models.load import load
from fastattn.settings import Settings
from tests.models.builders import hf_model, save_hf
from tests.models.quantized import save_quantized
from tests.quant.stored import Spec

from .documented import outputs

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


@pytest.mark.parametrize("family", ["910b", "310p", "910a"])
def test_torch_npus_operators_carry_a_model(family, tmp_path, monkeypatch):
    """A prompt in two forwards and a token through the router's calls alone, each computed as its page says.

    The cache's pages are the chip's: 128 tokens, and in NZ where ATB reads them. What has no operator on the
    chip (a gate, an embedding) runs on the CPU's backend, as on a device it would on torch's.
    """
    path = save_hf(hf_model("llama", dtype=torch.float16, head_dim=128), tmp_path / "model")
    ids = list(range(3, 40))
    with dispatch.use_backend("cpu"):
        expected = load(str(path), dtype="float16").logits([ids])[0]
    called: Counter[str] = Counter()

    def documented(i: Invocation) -> Any:
        assert faults(i) == []
        called[i.name] += 1
        return i.finish(outputs(i))

    monkeypatch.setattr(Invocation, "__call__", documented)
    monkeypatch.setattr(ascend.router, "current", lambda: chip_of(family))
    monkeypatch.setattr(ascend, "_EMULATED", False)
    monkeypatch.setattr(ascend, "settings", Settings.from_env({"FASTATTN_ASCEND": "torch_npu"}))
    monkeypatch.setattr(ascend_small, "settings", ascend.settings)
    monkeypatch.setattr(dispatch, "_resolved", {})
    monkeypatch.setattr(dispatch, "AUTOMATIC", ("ascend", "cpu"))
    model = load(str(path), dtype="float16")
    model.decoder.fused = False
    cache = model.kv_cache([len(ids)])
    assert (cache.page_size, cache.layout) == (128, chip_of(family).kv_layout)
    report = fastattn.check(model.logits, [ids], 18)
    assert report.ok, str(report)
    assert not report.unchecked
    ours = report.result[0]
    assert float((ours - expected).abs().max()) <= 0.02 * float(expected.abs().max())
    operators = {"910b": {"npu_fused_infer_attention_score_v2", "npu_scatter_pa_kv_cache", "npu_swiglu"}}
    nz = {"_npu_reshape_and_cache", "_npu_paged_attention", "npu_rotary_mul", "npu_rms_norm"}
    splitfuse = "_npu_paged_attention_splitfuse" + "_v2" * (family == "310p")
    assert called.keys() >= operators.get(family, nz | {splitfuse}), called


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
