"""bench/quantizer.py: its statistics, its texts, and a short real run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import quantizer as bench_quantizer
from fastattn.quant.recipe import Recipe
from lib import text
from tests.models.builders import hf_model, save_hf

from .test_bench import FIELDS, run_program


def losses(perplexity: float) -> torch.Tensor:
    return torch.full((12,), math.log(perplexity), dtype=torch.float64)


def test_recovered_is_the_part_of_what_rounding_adds() -> None:
    assert bench_quantizer.recovered(losses(13.0), losses(16.0), losses(12.0)) == pytest.approx(0.75)
    assert bench_quantizer.recovered(losses(16.0), losses(16.0), losses(12.0)) == pytest.approx(0)


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(40, dtype=torch.float64)
    found = bench_quantizer.jackknife(lambda v: float(v.mean()), 40, x)
    assert found == pytest.approx(float(x.std(correction=1)) / 40**0.5)
    blocks = x.view(8, 5).mean(1)
    by_block = bench_quantizer.jackknife(lambda v: float(v.mean()), 8, x)
    assert by_block == pytest.approx(float(blocks.std(correction=1)) / 8**0.5)


def test_methods_are_recipes_that_differ() -> None:
    made = [Recipe(**settings) for settings in bench_quantizer.METHODS.values()]
    assert len(set(made)) == len(made)


def test_calibration_and_evaluation_share_no_passages() -> None:
    """Ten words in a row of the one text hardly ever stand in the other."""

    def passages(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 10]) for i in range(len(words) - 9)}

    one, other = (passages(t.split()) for t in (text.docstrings(), text.reference()))
    assert min(len(one), len(other)) > 30_000
    assert len(one & other) < 0.01 * min(len(one), len(other))


@pytest.mark.slow
def test_quantizer_program(tmp_path: Path) -> None:
    out = tmp_path / "quantizer.json"
    model = save_hf(hf_model("llama"), tmp_path / "m")
    line = "--bits 3,4 --group-size 32 --method rtn-search,act-order --samples 6 --seqlen 48 --context 48"
    done = run_program("quantizer.py", f"--model={model}", *line.split(), "--chunks=4", "--json", str(out))
    rows = [r.split()[:2] for r in done.stdout.splitlines()[4:]]
    assert rows == [[b, m] for b in "34" for m in ("rtn", "rtn-search", "act-order")]
    written = json.loads(out.read_text())
    assert all(set(r) == FIELDS for r in written)
    found = {tuple(r["case"].split()[1:3]) for r in written if r["metric"] == "recovered of what rtn adds"}
    assert found == {(m, f"bits={b}") for b in (3, 4) for m in ("rtn-search", "act-order")}
    perplexities = [r for r in written if r["metric"] == "perplexity"]
    assert all(r["ratio"] == pytest.approx(r["peer_value"] / r["ours"]) for r in perplexities)
