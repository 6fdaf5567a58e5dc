"""Writing Hugging Face directories: configs that read back as they were, files whole or not at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastattn.models import hf_write
from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.config import ModelConfig, RopeConfig
from fastattn.models.hf_config import parse_config
from fastattn.spec import CheckpointError
from tests.models.builders import FAMILIES, hf_model, save_gguf, save_hf


def config_of(family: str, tmp_path: Path, **overrides: Any) -> ModelConfig:
    return open_checkpoint(save_hf(hf_model(family, **overrides), tmp_path, tokenizer=False)).config


ROPES = {
    "default": RopeConfig(1e6, "default", 16, False),
    "linear": RopeConfig(1e4, "linear", 16, False, {"factor": 2.0}),
    "yarn": RopeConfig(
        1e4, "yarn", 16, False,
        {"factor": 4.0, "original_max_position_embeddings": 128.0, "attention_factor": 1.2},
    ),
    "longrope": RopeConfig(
        1e4, "longrope", 16, False,
        {"factor": 1.0, "original_max_position_embeddings": 512.0, "short_factor": [1.5] * 8,
         "long_factor": [1.5] * 8, "attention_factor": 1.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_configs_read_back(family: str, rope: str, tmp_path: Path) -> None:
    overrides = {"head_dim": 16} | ({"max_window_layers": 0} if family == "qwen2" else {})
    config = replace(config_of(family, tmp_path, **overrides), rope=ROPES[rope])
    assert parse_config(hf_write.to_config_json("here", config), Path("there")) == config


def test_a_llama_with_a_window_becomes_mistral(tmp_path: Path) -> None:
    save_gguf(hf_model("mistral"), tmp_path / "m.gguf")
    config = open_checkpoint(tmp_path / "m.gguf").config
    assert (config.family, config.windows) == ("llama", (24, 24))
    config = replace(config, rope=replace(config.rope, interleaved=False))
    values = hf_write.to_config_json("here", config)
    assert parse_config(values, Path("there")) == replace(config, family="mistral")


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("llama", {"qkv_bias": True}, "qkv_bias"),
        ("mistral", {"mlp_bias": True}, "mlp_bias"),
        ("qwen2", {"windows": (None, 16, None)}, "windows"),
        ("llama", {"rope": RopeConfig(1e4, "default", 16, True)}, "rope"),
    ],
)
def test_configs_without_a_counterpart_are_refused(
    family: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    config = replace(config_of(family, tmp_path, num_hidden_layers=3), **changes)
    with pytest.raises(CheckpointError, match=f"m: has no config.json in Hugging Face's words: .*{named}"):
        hf_write.to_config_json("m", config)


def test_index_of_shards(tmp_path: Path) -> None:
    made = {
        "a": {"x": torch.zeros(3, 5), "y": torch.zeros(2, dtype=torch.float16)},
        "b": {"z": torch.ones(7)},
    }
    for name, tensors in made.items():
        hf_write.write_tensors(tmp_path / name, tensors)
    hf_write.write_index(tmp_path, ["a", "b"])
    index = json.loads((tmp_path / hf_write.INDEX).read_text())
    assert index == {
        "metadata": {"total_size": 15 * 4 + 2 * 2 + 7 * 4},
        "weight_map": {"x": "a", "y": "a", "z": "b"},
    }


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        hf_write.write_tensors(tmp_path / "a", {"x": torch.zeros(3)})
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from fastattn.models import hf_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    if sys.argv[2] == "tensors":
        hf_write.write_tensors(Path(sys.argv[1]), {"x": torch.zeros(100_000)})
    else:
        hf_write.write_json(Path(sys.argv[1]), {"x": "y" * 100_000})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
@pytest.mark.parametrize("kind", ["tensors", "json"])
def test_a_disk_that_takes_no_more(kind: str, tmp_path: Path) -> None:
    """A file of before stays as it was, and nothing half-written is left."""
    path = tmp_path / "model.safetensors"
    hf_write.write_tensors(path, {"x": torch.ones(4)})
    command = [sys.executable, "-c", LIMITED, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"{path}: cannot be written: "), done.stderr
    assert torch.equal(load_file(path)["x"], torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere/a: cannot be written: No such file"):
        hf_write.write_tensors(tmp_path / "nowhere" / "a", {"x": torch.ones(4)})


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.unfinished").write_bytes(b"half")
    (tmp_path / "config.json").write_text("{}")
    hf_write.remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
