"""bench/compression.py: the statistics, the configurations, the simulated ranks, and a short real run."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

import compression
import fastattn
from fastattn.parallel.calibrate import ChannelShares
from fastattn.spec import Point
from lib.simulated_ranks import SimulatedRanks

from ..models.builders import hf_model, save_hf
from .test_bench import FIELDS, run_program


def test_change_is_that_of_the_perplexity() -> None:
    torch.manual_seed(0)
    exact = torch.rand(9, 50) * 3
    ours = exact + torch.randn(9, 50) * 0.1 + 0.02
    change = compression.Change.between(exact, ours)
    ratio = float((ours.double().mean() - exact.double().mean()).exp())
    assert change.percent == pytest.approx(100 * (ratio - 1), rel=1e-9)
    means = (ours.double() - exact.double()).mean(1)
    half = 2.306 * float(means.std()) / 3  # Student's t, 8 degrees of freedom
    assert change.low == pytest.approx(100 * math.expm1(float(means.mean()) - half), rel=1e-9)
    assert change.high == pytest.approx(100 * math.expm1(float(means.mean()) + half), rel=1e-9)
    assert math.isnan(compression.Change.between(exact[:1], ours[:1]).low)


def test_intervals_hold_what_they_promise() -> None:
    """Of many samples with no true change, about 95 % have 0 within the interval."""
    torch.manual_seed(0)
    inside = 0
    for _ in range(1000):
        change = compression.Change.between(torch.zeros(6, 4), torch.randn(6, 4) * 0.01)
        inside += change.low <= 0 <= change.high
    assert 930 <= inside <= 970


def test_exceptions_apply_where_they_say() -> None:
    shares = ChannelShares()
    for layer in range(3):
        for site in ("attn", "mlp"):
            x = torch.ones(1, 64)
            x[0, [5 + layer, 40, 3]] = torch.tensor([30.0, 20.0, 10.0])
            shares.add(Point(layer, site, "prefill"), x)  # type: ignore[arg-type]
    config = compression.configuration(
        '{"element": "int4", "outliers": 2, "at": [{"layers": [1], "block": 8},'
        ' {"sites": ["mlp"], "outliers": 3}, '
        '{"layers": [2], "sites": ["attn"], "element": "int8", "outliers": 0}]}'
    )
    made = compression.codecs(config, shares, 3)
    assert (made[0, "attn"].element, made[0, "attn"].block, made[0, "attn"].outliers) == ("int4", 32, (5, 40))
    assert (made[1, "mlp"].element, made[1, "mlp"].block, made[1, "mlp"].outliers) == ("int4", 8, (3, 6, 40))
    assert (made[2, "attn"].element, made[2, "attn"].outliers) == ("int8", ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e2m1", "Expecting value"),
        ("[1]", "expected a JSON object"),
        ('{"element": "e9m9"}', "element: 'e9m9'"),
        ('{"blocks": 3}', "unknown key 'blocks'"),
        ('{"at": [{"block": 0}]}', "block: 0"),
    ],
)
def test_configurations_are_checked(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        compression.configuration(text)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_simulated_ranks_sum_to_the_whole(world: int, tmp_path: Path) -> None:
    model = fastattn.load(save_hf(hf_model("llama", seed=1), tmp_path))
    (wanted,) = model.logits([[4, 9, 200, 33]])
    ranks = SimulatedRanks(model.config, world)
    model.decoder.policy = lambda p: ranks
    ranks.shares = ChannelShares()
    (ours,) = model.logits([[4, 9, 200, 33]])
    assert torch.allclose(ours, wanted, atol=1e-4)
    assert len(ranks.shares.outliers(1)) == 2 * model.config.num_layers


@pytest.mark.slow
def test_compression_program(tmp_path: Path) -> None:
    out = tmp_path / "compression.json"
    codecs = ['{"element": "int8", "scale": "fp16"}', '{"element": "e1m1", "block": 8}']
    chosen = [f"--codec={c}" for c in codecs]
    run_program(
        "compression.py", "--context=64", "--chunks=2", "--calibration_chunks=1", *chosen, "--json", str(out)
    )
    written = json.loads(out.read_text())
    assert all(set(r) == FIELDS for r in written)
    changes = [r["ours"] for r in written if r["metric"] == "perplexity change"]
    assert abs(changes[0]) < 5 < changes[1]
    assert [r["ours"] for r in written if r["metric"] == "effective bits"] == pytest.approx(
        [8.5 + 8 / 576, 4]
    )
