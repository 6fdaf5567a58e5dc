"""bench/planner.py: its records, the shortened model, and a short real run over an emulated link."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import planner as bench_planner
from fastattn.models.load import load
from fastattn.parallel.calibrate import recording
from lib import planner_worker
from tests.models.builders import hf_model, save_hf
from tests.parallel.cable import laid

from .markdown import ROOT


@pytest.mark.parametrize(
    "line", ["--layers 0", "--link 1ms", "--ranks two", "--ranks 2,1", "--inference_data_type int8"]
)
def test_arguments_are_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_planner.parser().parse_args(line.split())
    assert f"argument {line.split(maxsplit=1)[0]}" in capsys.readouterr().err


def test_the_first_layers_compute_what_they_do_in_the_whole_model(tmp_path: Path) -> None:
    path = save_hf(hf_model("qwen2", num_hidden_layers=3), tmp_path)
    whole, short = load(path), planner_worker.first_layers(load(path), 2)
    assert planner_worker.first_layers(whole, 9).config == whole.config
    assert (short.config.num_layers, len(short.config.windows), len(short.decoder.blocks)) == (2, 2, 2)
    seen = []
    for model in (whole, short):
        with recording(model.decoder) as shares:
            model.logits([range(3, 23)])
        seen.append(shares)
    for layer in (0, 1):
        for site in ("attn", "mlp"):
            assert torch.equal(seen[0].share(layer, site), seen[1].share(layer, site))
    assert seen[0].share(2, "mlp").numel() == whole.config.hidden_size
    with pytest.raises(ValueError, match="layer 2 mlp: no row was recorded"):
        seen[1].share(2, "mlp")


@pytest.mark.net
def test_planner_program(tmp_path: Path) -> None:
    """On a link of 10 ms a hop, direct sums beat gloo's all_reduce, and the planner sees it."""
    with laid():
        pass
    model, out = save_hf(hf_model("llama"), tmp_path / "model"), tmp_path / "planner.json"
    line = "--link 100mbit/10ms --prefill_tokens 20 --budget 0.3 --verbose"
    program = [sys.executable, str(ROOT / "bench" / "planner.py"), "--model", str(model)]
    done = subprocess.run(
        [*program, *line.split(), "--json", str(out)], check=True, capture_output=True, text=True, timeout=200
    )
    assert "off best" in done.stdout
    records = {(r["case"], r["metric"]): r for r in json.loads(out.read_text())}
    assert len(records) == 4
    for phase in ("prefill", "decode"):
        case = f"100mbit/10ms ranks=2 {model} {phase}"
        time = records[case, "time"]
        assert time["claim"] == "emulated"
        assert time["ours"] >= time["limit_value"] > 2 * 2 * 10  # two sync points a layer
        assert 1 <= records[case, "choice over the fastest"]["ours"] < 1.5
    assert records[case, "time"]["ratio"] > 1.1
