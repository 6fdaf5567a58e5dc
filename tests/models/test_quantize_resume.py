"""A quantization that was interrupted, killed or is repeated: the same result, or a refusal."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.quantize import Report, quantize
from fastattn.models.quantized_files import QuantizedFiles
from fastattn.quant.recipe import Recipe
from fastattn.spec import CheckpointError
from tests.models.builders import hf_model, save_gguf, save_hf
from tests.models.test_quantize import SMALL, TEXT, contents


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", num_hidden_layers=3), tmp_path_factory.mktemp("model"))


RESUMED = Recipe(group_size=32, act_order="global")


@pytest.fixture(scope="module")
def whole(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    out = tmp_path_factory.mktemp("whole")
    return out, quantize(directory, out, RESUMED, TEXT, **SMALL)


def test_going_on_sees_vectors_as_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file of 16-bit matrices has float32 norms, which are written in 16 bits."""
    save_gguf(hf_model("llama"), tmp_path / "m.gguf", "F16")
    assert open_checkpoint(tmp_path / "m.gguf").config.dtype == torch.float16
    quantize(tmp_path / "m.gguf", tmp_path / "whole", RESUMED, TEXT, **SMALL)
    write = QuantizedFiles.write_layer

    def interrupted(self: QuantizedFiles, layer: int, *rest: Any) -> None:
        write(self, layer, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedFiles, "write_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(tmp_path / "m.gguf", tmp_path / "again", RESUMED, TEXT, **SMALL)
    quantize(tmp_path / "m.gguf", tmp_path / "again", RESUMED, TEXT, **SMALL)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_an_interrupted_run_goes_on_to_the_same_result(
    directory: Path,
    whole: tuple[Path, Report],
    layers: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, finish = QuantizedFiles.write_layer, QuantizedFiles.finish

    def interrupted(self: QuantizedFiles, layer: int, *rest: Any) -> None:
        if layer == layers:
            raise KeyboardInterrupt
        write(self, layer, *rest)

    def interrupted_at_the_end(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(QuantizedFiles, "write_layer", interrupted)
    monkeypatch.setattr(QuantizedFiles, "finish", interrupted_at_the_end)
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        quantize(directory, out, RESUMED, TEXT, **SMALL)
    assert len(list(out.glob("*.safetensors"))) == 1 + layers
    with pytest.raises(CheckpointError, match="holds neither"):
        open_checkpoint(out)
    monkeypatch.setattr(QuantizedFiles, "finish", finish)
    solved: list[int] = []

    def counted(self: QuantizedFiles, layer: int, *rest: Any) -> None:
        solved.append(layer)
        write(self, layer, *rest)

    monkeypatch.setattr(QuantizedFiles, "write_layer", counted)
    report = quantize(directory, out, RESUMED, TEXT, **SMALL)
    assert solved == list(range(layers, 3))
    assert contents(out) == contents(whole[0])
    assert report.quantized == whole[1].quantized


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """SIGKILL, wherever it strikes."""
    model = save_hf(hf_model("llama", num_hidden_layers=6), tmp_path / "m")
    (tmp_path / "text").write_text(TEXT)
    line = [
        "--group-size",
        "32",
        "--act-order",
        "--text",
        tmp_path / "text",
        "--samples",
        "8",
        "--threads",
        "1",
    ]
    command = [sys.executable, "-m", "fastattn", "quantize", model, "OUT", "--seqlen", "64", *line]

    def run(out: str) -> list[str]:
        return [str(tmp_path / out) if part == "OUT" else str(part) for part in command]

    subprocess.run(run("whole"), check=True, timeout=120, capture_output=True)
    with subprocess.Popen(run("killed")) as process:
        begin = time.monotonic()
        while len(list((tmp_path / "killed").glob("model-*.safetensors"))) < 3:
            assert process.poll() is None
            assert time.monotonic() - begin < 100
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "killed" / "config.json").exists()
    subprocess.run(run("killed"), check=True, timeout=120, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": Recipe(bits=3)}, "recipe"),
        ({"samples": 5}, "calibration"),
        ({"dtype": "fp16"}, "dtype"),
        ({"text": TEXT[5000:]}, "calibration"),
        ({"model": "other"}, "model"),
    ],
)
def test_an_unfinished_run_of_other_settings_is_kept(
    directory: Path, change: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"model": directory, "recipe": Recipe(), "text": TEXT, **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(QuantizedFiles, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(out=tmp_path / "q", **given)
    before = contents(tmp_path / "q")
    if "model" in change:
        change = {"model": save_hf(hf_model("llama", seed=1, num_hidden_layers=2), tmp_path / "other")}
    with pytest.raises(ValueError, match=f"out: .* holds an unfinished run of another {named}"):
        quantize(out=tmp_path / "q", **{**given, **change})
    assert contents(tmp_path / "q") == before
