"""Whole models through this backend alone: the same tokens and logits as on `cpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import whole

from .calls import DEVICE

pytestmark = [pytest.mark.emulate("triton"), pytest.mark.toolchain, pytest.mark.gpu]


@pytest.fixture(scope="module", params=whole.FORMS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole.llama(request.param, tmp_path_factory.mktemp("model"))


def test_generate_runs_every_op_here(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole.generates_as_the_cpu(directory, "triton", DEVICE, capsys)


def test_logits_are_as_exact_as_on_the_cpu(directory: Path) -> None:
    whole.logits_are_as_exact_as_the_cpus(directory, "triton", DEVICE)
