"""``fastattn quantize`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.cli.forks import Forks
from tests.models.builders import hf_model, save_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, ``m``, and a text, ``text``."""
    path = tmp_path_factory.mktemp("quantize")
    save_hf(hf_model("llama", seed=7), path / "m")
    (path / "text").write_text("\n\n".join(topics[name] for name in sorted(topics))[:30_000])
    (path / "latin").write_bytes("café".encode("latin-1") * 1000)
    return path


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastattn", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


OPTIONS = ("--text", "text", "--samples", 6, "--seqlen", 48, "--group-size", 32)


def test_quantize_then_generate(folder: Path) -> None:
    done = run(folder, "quantize", "m", "q", *OPTIONS, "--bits", 4, "--act-order", "--asym", "--threads", 1)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("q: 0.1 million weights at 5.03 bits, ")
    assert second.startswith("perplexity on 384 held-out tokens: dense ")
    generated = run(
        folder, "generate", "q", "--prompt", "The quick", "--max-tokens", 5, "--ignore-eos", "--json"
    )
    assert generated.returncode == 0, generated.stderr
    assert len(json.loads(generated.stdout)["completions"][0]["token_ids"]) == 5


def test_json(folder: Path) -> None:
    done = run(folder, "quantize", "m", "q8", *OPTIONS, "--bits", 8, "--eval-text", "text", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert (facts["out"], facts["weights"], facts["tokens"]) == ("q8", 86016, 16 * 24)
    ratio = facts["quantized"]["value"] / facts["dense"]["value"]
    assert facts["change"]["value"] == pytest.approx(ratio - 1)
    assert abs(facts["change"]["value"]) < 0.02
    assert facts["change"]["error"] > 0


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(folder: Path) -> None:
    """Here a limit on the size of files, which a layer's shard exceeds and the embedding's does not."""
    save_hf(hf_model("llama", intermediate_size=2048, num_hidden_layers=1), folder / "wide")
    command = [sys.executable, "-m", "fastattn", "quantize", "wide", "full", *map(str, OPTIONS)]
    limited = ["sh", "-c", 'ulimit -f 360; exec "$@"', "sh", *command]  # of 512 bytes
    done = subprocess.run(limited, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    shard = "full/model-00002-of-00002.safetensors"
    assert done.stderr.startswith(f"fastattn: error: {shard}: cannot be written: ")
    assert done.stderr.count("\n") == 1
    held = sorted(p.name for p in (folder / "full").iterdir())
    assert held == ["model-00001-of-00002.safetensors", "quantize.json"]
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    assert (folder / "full" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent", "q0"], "/nonexistent: no such file or directory"),
        (["m", "m"], "out: m is not empty and holds no unfinished quantization"),
        (["m", "q0", "--bits", "5"], "bits: 5, expected one of 2, 3, 4, 8"),
        (["m", "q0", "--act-order", "best"], "act_order: 'best', expected one of"),
        (["m", "q0", "--samples", "100000"], "text: too short for 100000 sequences"),
        (["m", "q0", "--text", "nowhere"], "[Errno 2] No such file or directory: 'nowhere'"),
        (["m", "q0", "--text", "latin"], "latin: is not UTF-8 text"),
        (["m", "q0", "--threads", "0"], "threads: 0, expected at least 1"),
        (["m", "/proc/q0"], "No such file or directory: '/proc/q0'"),
    ],
    ids=lambda v: "-".join(v[-2:]).strip("-/") if isinstance(v, list) else "",
)
def test_errors_are_one_line(folder: Path, forks: Forks, arguments: list[str], message: str) -> None:
    done = forks.run("quantize", *OPTIONS, *arguments, folder=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("fastattn: error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "q0").exists()


def test_text_is_required(folder: Path, forks: Forks) -> None:
    done = forks.run("quantize", "m", "q0", folder=folder)
    assert done.returncode == 2
    assert "the following arguments are required: --text" in done.stderr
