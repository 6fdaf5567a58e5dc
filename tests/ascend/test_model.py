"""Whole models through the backend `ascend`, interpreted: the CPU's tokens, and no op that fell back."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from ascend_ops.router import Invocation, chip_of
from ascend_ops.router.validate import faults
from fastattn import dispatch
from fastattn.backends import ascend, ascend_small
from fastattn.models.load import load
from fastattn.settings import Settings
from tests.models import whole
from tests.models.builders import hf_model, save_hf

from .documented import outputs

pytestmark = [pytest.mark.emulate("ascend"), pytest.mark.toolchain]


@pytest.fixture(scope="module", params=whole.FORMS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole.llama(request.param, tmp_path_factory.mktemp("model"))


def test_generate_runs_every_op_here(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole.generates_as_the_cpu(directory, "ascend", "cpu", capsys)


def test_logits_are_as_exact_as_on_the_cpu(directory: Path) -> None:
    whole.logits_are_as_exact_as_the_cpus(directory, "ascend", "cpu")


@pytest.mark.parametrize("family", ["910b", "310p", "910a"])
def test_torch_npus_operators_carry_a_model(family, tmp_path, monkeypatch):
    """A prompt in two forwards and a token through the router's calls alone, each computed as its page says.

    The cache's pages are the chip's: 128 tokens, and in NZ where ATB reads them. What has no operator on the
    chip (a gate, an embedding) runs on the CPU's backend, as on a device it would on torch's.
    """
    assert not dispatch.unavailable("ascend")  # is decided once a process, here while it is emulated
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
