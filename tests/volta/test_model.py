"""Whole models through this backend alone, in the emulator: the same tokens and logits as on `cpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import whole

pytestmark = [pytest.mark.emulate("volta"), pytest.mark.toolchain]


@pytest.fixture(scope="module", params=whole.FORMS)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A head_dim that prefill has a kernel for; the padded ones are tested op by op.
    return whole.llama(request.param, tmp_path_factory.mktemp("model"), head_dim=64)


def test_generate_runs_every_op_here(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole.generates_as_the_cpu(directory, "volta", "cpu", capsys)


def test_logits_are_as_exact_as_on_the_cpu(directory: Path) -> None:
    whole.logits_are_as_exact_as_the_cpus(directory, "volta", "cpu")
