"""What `fastattn plan` measures and chooses, in groups of 2 and 3 real processes (see planning_cases.py)."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.models.builders import hf_model, save_hf
from tests.parallel import planning_cases
from tests.parallel.ranks import HERE, Ranks


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda n: f"world{n}"
)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What each rank says about each case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    model = hf_model("llama", seed=3, attention_bias=True, mlp_bias=True, num_hidden_layers=3)
    env = {"SEED": str(secrets.randbelow(1 << 30)), "MODEL": str(save_hf(model, folder / "model"))}
    with Ranks(HERE / "planning_cases.py", [], request.param, folder, env=env) as ranks:
        assert set(ranks.wait(180).values()) == {0}, ranks.everything()
        return [json.loads(ranks.out(r)) for r in range(request.param)]


@pytest.mark.parametrize("name", [case.__name__ for case in planning_cases.CASES])
def test_case(outcomes: list[dict[str, str]], name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert not outcome[name], f"rank {rank}\n{outcome[name]}"
