"""``python -m ascend_ops report``, as far as it goes without an NPU."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ascend_ops import report
from ascend_ops.router import chip_of, choose, unsupported

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
    assert printed.count("\n| ") == 1 + len(list(report.cases(full=False, emulate=True)))
    assert "All right." in printed


@pytest.mark.parametrize("family", ["910b", "310p"])
def test_its_oracle_and_the_documents_agree(family):
    """What the report would compare on a device: the operators' documented results and its float64."""
    compared = 0
    for case in report.cases(full=False, emulate=True):
        call = report.build(case, chip_of(family), torch.device("cpu"))
        if unsupported(call, chip_of(family)):
            continue
        i = choose(call, chip_of(family))
        out = i.finish(outputs(i))[0].flatten(0, -3)
        assert float((out.double() - report.exact(call)).abs().max()) <= 4 * torch.finfo(out.dtype).eps * 4
        compared += 1
    assert compared >= 4


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


def test_wrong_and_failing_operators_show():
    expected = torch.zeros(2, 1, 4, dtype=torch.float64)

    def broken() -> torch.Tensor:
        raise RuntimeError("aicore error\nmore")

    cpu = torch.device("cpu")
    assert report.measure(lambda: torch.full((2, 1, 4), 0.1), expected, cpu, 1)[0].startswith("WRONG 1.0e-01")
    assert report.measure(broken, expected, cpu, 1) == ("FAILED RuntimeError: aicore error", False)
    text, right = report.measure(lambda: torch.zeros(2, 1, 4), expected, cpu, 2)
    assert right
    assert text.endswith(" us")
