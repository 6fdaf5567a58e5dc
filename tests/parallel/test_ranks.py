"""Exchanges, sharded layers and sync policies in groups of 1 to 4 real processes (see run.py)."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.models.builders import hf_model, save_hf
from tests.parallel import cases, model_cases, policy_cases, wire_cases
from tests.parallel.ranks import HERE, Ranks

PROGRAMS = {
    "cases.py": cases.CASES,
    "policy_cases.py": policy_cases.CASES,
    "model_cases.py": model_cases.CASES,
}
#: Ranks, and whether they share memory: else they meet over sockets only, as on several machines.
GROUPS = [
    pytest.param((1, True), id="world1"),
    pytest.param((2, True), id="world2"),
    pytest.param((2, False), id="world2-sockets"),
    pytest.param((3, False), id="world3-sockets", marks=pytest.mark.slow),
    pytest.param((4, True), id="world4", marks=pytest.mark.slow),
]
NAMES = [(program, case.__name__) for program, found in PROGRAMS.items() for case in found]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases before and after the sums, and heads enough for 4 ranks."""
    model = hf_model("llama", seed=3, attention_bias=True, mlp_bias=True, num_hidden_layers=3)
    return save_hf(model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=GROUPS)
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> dict[str, list[dict[str, str]]]:
    """What each rank of one group says about each case of each program."""
    found, (world, shared) = {}, request.param
    for program in PROGRAMS:
        folder: Path = tmp_path_factory.mktemp("ranks")
        env = {
            "SEED": str(secrets.randbelow(1 << 30)),
            "MODEL": str(model),
            "FASTATTN_SHARED_MEMORY": str(int(shared)),
        }
        with Ranks(HERE / program, [], world, folder, env=env) as ranks:
            codes = ranks.wait(120)
            assert set(codes.values()) == {0}, ranks.everything()
            found[program] = [json.loads(ranks.out(r)) for r in range(world)]
    return found


@pytest.mark.parametrize(("program", "name"), NAMES, ids=[name for _, name in NAMES])
def test_case(outcomes: dict[str, list[dict[str, str]]], program: str, name: str) -> None:
    for rank, outcome in enumerate(outcomes[program]):
        assert not outcome[name], f"rank {rank}\n{outcome[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("world", [4, 8])
def test_bytes_between_many_ranks(tmp_path: Path, world: int) -> None:
    with Ranks(HERE / "wire_cases.py", [], world, tmp_path, env={"SEED": "0"}) as ranks:
        assert set(ranks.wait(180).values()) == {0}, ranks.everything()
        for rank in range(world):
            outcome = json.loads(ranks.out(rank))
            assert outcome.keys() == {case.__name__ for case in wire_cases.CASES}
            assert not any(outcome.values()), f"rank {rank}\n{outcome}"
