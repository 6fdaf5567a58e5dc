"""``fastattn report`` and ``python -m ascend_ops report``, as far as they go without a device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ascend_ops import report
from ascend_ops.report import attention, collective, measure, small
from ascend_ops.router import Invocation, chip_of
from fastattn import check_calls, cli, dispatch
from fastattn.backends import ascend
from fastattn.cli import report as command

from .conftest import ROOT
from .documented import outputs


def test_without_an_npu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "ascend_ops", "report"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "There is no NPU to report on" in done.stdout


@pytest.mark.emulate("ascend")
@pytest.mark.toolchain
def test_emulated_matrix_is_right(capsys):
    status = report.run(emulate=True)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert printed.count("\n| case |") == len(report.PARTS)
    assert printed.count("\n| ") - len(report.PARTS) > len(list(attention.cases(full=False, quick=True))) + 40
    assert "FAILED" not in printed
    assert "All right." in printed


@pytest.mark.emulate("ascend")
@pytest.mark.toolchain
def test_whole_models_are_right(capsys, monkeypatch):
    """The one command of an NPU's owner, less the matrix above."""
    monkeypatch.setattr(report, "run", lambda **_: 0)
    monkeypatch.setattr(command, "check_every_op", lambda *_: True)
    status = cli.main(["report", "--backend", "ascend"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    for line in ("float16: right", "4 bits with act-order: right", "append_kv on ascend", "linear on ascend"):
        assert line in printed
    assert "not on ascend" not in printed


@pytest.mark.parametrize(
    ("family", "operators"),
    [
        ("910b", {"npu_fused_infer_attention_score_v2", "npu_rotary_mul", "npu_weight_quant_batchmatmul"}),
        ("310p", {"_npu_flash_attention_v3", "_npu_paged_attention", "_npu_reshape_and_cache"}),
        ("910a", {"_npu_paged_attention_splitfuse", "_npu_reshape_and_cache"}),
    ],
)
def test_its_oracle_and_the_documents_agree(family, operators, monkeypatch):
    """What the report would call, computed as the operators' pages say, is right by the report's float64."""
    monkeypatch.setattr(Invocation, "__call__", lambda i: i.finish(outputs(i)))
    setting = measure.Setting(torch.device("cpu"), chip_of(family), 0, quick=True, kernels=False)
    found = [*attention.rows(setting), *small.rows(setting)]
    assert all(r.right for r in found), [r for r in found if not r.right]
    assert {r.operator for r in found} >= operators | {"npu_rms_norm"}


@pytest.mark.parametrize("cann", ["8.5.0", None])
def test_it_names_the_machine(cann, monkeypatch):
    """CANN's version is one of torch's: torch_npu.version has these two names only."""
    machine = SimpleNamespace(get_device_name=lambda: "Ascend910B3")
    version = SimpleNamespace(__version__="2.13.0", git_version="c798c65")
    if cann:
        monkeypatch.setattr(torch.version, "cann", cann, raising=False)
    lines = list(report.npu(SimpleNamespace(npu=machine, version=version), chip_of("910b")))
    assert lines[0] == f"Ascend910B3 (910b), CANN {cann or 'unknown'}"
    assert "npu_rms_norm" in lines[1]


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("aicore error\nmore")


def test_a_choice_that_raises_is_a_row():
    setting = measure.Setting(torch.device("cpu"), chip_of("910b"), 0, kernels=False)
    found = measure.row(setting, "norm", torch.zeros(2), broken, measure.same, None)
    assert found == ("norm", "", "FAILED RuntimeError: aicore error", "", False)


def test_a_part_that_raises_is_a_row_and_the_others_go_on(monkeypatch, capsys):
    row = measure.Row("sum", "op", "0.0e+00", "", right=True)

    def one_then_broken(_: object) -> Any:
        yield row
        broken()

    monkeypatch.setattr(report, "PARTS", {"first": one_then_broken, "second": lambda _: iter([row])})
    assert report.run(emulate=True) == 1
    printed = capsys.readouterr().out
    assert "| first: the rest |  | FAILED RuntimeError: aicore error |" in printed
    assert printed.count("| sum | op |") == 2
    assert "SOMETHING IS WRONG" in printed


def test_a_group_that_cannot_be_joined_is_a_row(monkeypatch, capsys):
    monkeypatch.setattr(collective.dist, "init_process_group", broken)
    monkeypatch.setattr(report, "PARTS", {"sum": collective.rows})
    assert report.run(emulate=True) == 1
    assert "| sum: the rest |  | FAILED RuntimeError: aicore error |" in capsys.readouterr().out


def test_the_models_are_checked_though_the_matrix_raises(monkeypatch, capsys):
    checked = []
    monkeypatch.setattr(report, "run", broken)
    monkeypatch.setattr(command, "check_model", lambda *of: checked.append(of) or True)
    monkeypatch.setattr(command, "check_every_op", lambda *_: True)
    assert cli.main(["report", "--backend", "ascend", "--device", "cpu"]) == 1
    assert "ascend_ops: FAILED RuntimeError: aicore error" in capsys.readouterr().out
    assert [form for _, _, form in checked] == ["fp16", "int4"]


def test_one_rank_prints_and_checks_models(monkeypatch, capsys):
    monkeypatch.setattr(report, "run", lambda **_: 1)
    monkeypatch.setattr(command, "check_model", broken)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["report", "--backend", "ascend", "--device", "cpu"]) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("family", ["310p", "910a"])
def test_every_op_without_a_compiler_is_right(family, on_chip, monkeypatch, capsys):
    """What the router refuses of a call for its lengths is a refusal, and NZ pages are read and written."""
    on_chip(family)
    here = ascend.BACKEND._replace(device_types=("cpu",), available=list)
    monkeypatch.setattr(Invocation, "__call__", lambda i: i.finish(outputs(i)))
    monkeypatch.setattr(dispatch, "load_backend", lambda _: here)
    monkeypatch.setattr(dispatch, "unavailable", lambda _: ())
    monkeypatch.setattr(dispatch, "_resolved", {})
    monkeypatch.setattr(check_calls, "_messages", lambda _: ())  # it has no codec
    assert command.check_every_op("ascend", "cpu")
    printed = capsys.readouterr().out
    refusal = r"refused: attention on 310p, FASTATTN_ASCEND=auto: torch_npu, .*atb: k: other lengths than q;"
    for call in ("causal, more keys than queries", "decode"):
        assert bool(re.search(rf"\| {call} \| float16 \| {refusal}", printed)) == (family == "310p")
    for call, op in (("prefill from", "attention"), ("decode from", "attention"), ("append to", "append_kv")):
        pages = "NZ" if op == "append_kv" else "pages of 128 in NZ"
        assert f"| {call} {pages} | float16 | {op} on ascend: " in printed


@pytest.mark.emulate("ascend")
@pytest.mark.toolchain
def test_every_op_of_the_interpreted_kernels_is_right(capsys):
    assert command.check_every_op("ascend", "cpu"), capsys.readouterr().out


def test_wrong_and_failing_operators_show():
    expected = torch.zeros(2, 1, 4, dtype=torch.float64)

    once, twice = (measure.Setting(torch.device("cpu"), chip_of("910b"), runs) for runs in (1, 2))
    assert measure.measure(lambda: torch.full((2, 1, 4), 0.1), expected, once)[0].startswith("WRONG 1.0e-01")
    assert measure.measure(broken, expected, once) == ("FAILED RuntimeError: aicore error", False)
    text, right = measure.measure(lambda: torch.zeros(2, 1, 4), expected, twice)
    assert right
    assert text.endswith(" us")
