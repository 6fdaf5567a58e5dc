"""Asks torch_npu's schemas and meta kernels about invocations, many at once (`stub_npu`)."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_ops.router import Invocation

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-ascend/bin/python"
SITE = ROOT / ".venv-ascend/torch-npu"


def plain(x: Any) -> Any:
    """An argument as JSON: of a tensor, its shape, strides and dtype."""
    if isinstance(x, torch.Tensor):
        return {"tensor": [list(x.shape), list(x.stride()), str(x.dtype).removeprefix("torch.")]}
    return list(x) if isinstance(x, tuple) else x


def ask(invocations: Sequence[Invocation]) -> list[dict[str, Any]]:
    """torch_npu's answer to each; skips the test, loudly, where .venv-ascend is not."""
    if not (SITE / "torch_npu").is_dir() or not PYTHON.exists():
        pytest.skip("NOT CHECKED against torch_npu: `make ascend-tools` did not make .venv-ascend")
    calls = [
        {
            "namespace": i.namespace,
            "name": i.name,
            "args": [plain(a) for a in i.args],
            "kwargs": {name: plain(a) for name, a in i.kwargs.items()},
        }
        for i in invocations
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "calls.json", Path(folder) / "results.json"
        asked.write_text(json.dumps(calls))
        worker = Path(__file__).with_name("stub_npu.py")
        environ = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        environ.pop("PYTHONPATH", None)
        done = subprocess.run(
            [PYTHON, worker, SITE, asked, answered],
            env=environ, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        found: list[dict[str, Any]] = json.loads(answered.read_text())
    return found
