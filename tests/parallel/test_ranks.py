"""The sharded layers and collectives in groups of 1 to 4 real processes (see cases.py)."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.parallel.cases import CASES
from tests.parallel.ranks import HERE, Ranks

NAMES = [case.__name__ for case in CASES]


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids=lambda n: f"world{n}")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    """What each rank of one group says about each case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    env = {"SEED": str(secrets.randbelow(1 << 30))}
    with Ranks(HERE / "cases.py", [], request.param, folder, env=env) as ranks:
        codes = ranks.wait(120)
        assert set(codes.values()) == {0}, ranks.everything()
        return [json.loads(ranks.out(r)) for r in range(request.param)]


@pytest.mark.parametrize("name", NAMES)
def test_case(outcomes: list[dict[str, str]], name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert not outcome[name], f"rank {rank}\n{outcome[name]}"
