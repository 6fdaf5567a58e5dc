"""What `import fastattn` brings and what it must not."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastattn

HEAVY = ("triton", "torch_npu", "transformers", "safetensors", "gguf", "tokenizers", "jinja2", "einops")
PROGRAM = "import torch, sys; before = set(sys.modules); import fastattn; print(*set(sys.modules) - before)"


def test_import_is_light() -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    brought = {name.split(".")[0] for name in result.stdout.split()}
    assert "fastattn" in brought
    assert not brought.intersection(HEAVY)


@pytest.mark.parametrize("name", fastattn.__all__)
def test_name_exists(name: str) -> None:
    assert getattr(fastattn, name) is not None


def test_names() -> None:
    promised = {
        "attention", "use_backend", "UnsupportedError", "flash_attn_func", "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func", "flash_attn_varlen_func", "flash_attn_with_kvcache",
    }  # fmt: skip
    assert promised <= set(fastattn.__all__)
    assert fastattn.__version__.count(".") == 2
