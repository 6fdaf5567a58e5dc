"""Outlier channels: what is counted, which are chosen, and that counting changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.models.generate import Model
from fastattn.parallel.calibrate import ChannelShares, recording
from fastattn.parallel.group import single
from fastattn.spec import Point

from ..models.builders import hf_model, save_hf

PROMPTS = [[5, 9, 200, 31, 7, 8], [17, 4]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Row-parallel weights that make channels 3 and 40 large after attention, 7 after the MLP."""
    made = hf_model("llama", seed=3)
    for layer in made.model.layers:
        layer.self_attn.o_proj.weight.data[[3, 40]] *= 30
        layer.mlp.down_proj.weight.data[7] *= 30
    return fastattn.load(save_hf(made, Path(tmp_path_factory.mktemp("model"))))


def test_the_large_channels_are_found_at_their_sites(model: Model) -> None:
    with recording(model.decoder) as shares:
        model.logits(PROMPTS)
    sites = [(layer, site) for layer in range(model.config.num_layers) for site in ("attn", "mlp")]
    assert shares.outliers(2).keys() == set(sites)
    for layer in range(model.config.num_layers):
        assert shares.outliers(2)[layer, "attn"] == (3, 40)
        assert shares.outliers(1)[layer, "mlp"] == (7,)
        assert float(shares.share(layer, "mlp")[7]) > 10
    assert set(shares.outliers(0).values()) == {()}
    assert shares.outliers(64)[0, "attn"] == tuple(range(64))


def test_recording_changes_no_result_and_ends(model: Model) -> None:
    policy, wanted = model.decoder.policy, model.logits(PROMPTS)
    with recording(model.decoder):
        assert model.decoder.policy is not policy
        ours = model.logits(PROMPTS)
    assert model.decoder.policy is policy
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    with pytest.raises(KeyError), recording(model.decoder):
        raise KeyError
    assert model.decoder.policy is policy


def test_shares_are_the_mean_over_rows_of_a_channels_part() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 24) * 10.0 ** torch.randint(-3, 4, (n, 1)) for n in (5, 1, 8)]
    shares, point = ChannelShares(), Point(4, "mlp", "prefill")
    for part in parts:
        shares.add(point, part)
    shares.add(point._replace(phase="decode"), torch.zeros(3, 24))  # nothing to count
    bad = torch.ones(2, 24)
    bad[0, 3], bad[1, 4] = torch.nan, torch.inf
    shares.add(point, bad)
    x = torch.cat(parts).double().square()
    exact = (x / x.mean(1, keepdim=True)).mean(0)
    assert torch.allclose(shares.share(4, "mlp"), exact, rtol=1e-12)
    assert float(shares.share(4, "mlp").mean()) == pytest.approx(1)
    shares.merge(single())
    assert torch.allclose(shares.share(4, "mlp"), exact, rtol=1e-12)


def test_equal_channels_are_taken_from_the_first() -> None:
    shares = ChannelShares()
    shares.add(Point(0, "attn", "prefill"), torch.tensor([[1.0, 2.0, 1.0, 2.0, 2.0]]))
    assert shares.outliers(2) == {(0, "attn"): (1, 3)}
    assert shares.outliers(4) == {(0, "attn"): (0, 1, 3, 4)}


def test_what_was_not_recorded_is_named() -> None:
    shares = ChannelShares()
    with pytest.raises(ValueError, match=r"^layer 0 attn: no row was recorded there, only at layers: none"):
        shares.share(0, "attn")
    shares.add(Point(0, "attn", "prefill"), torch.ones(1, 8))
    with pytest.raises(ValueError, match=r"^layer 1 mlp: .* only at layers: 0 attn"):
        shares.share(1, "mlp")
    for count in (-1, 9):
        with pytest.raises(ValueError, match=f"^count: {count}, expected 0 to 8"):
            shares.outliers(count)
