"""Tiling-AllReduce through npu_mm_all_reduce_base: the calls of one prefill, on two ranks."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from ascend_ops.router import Invocation, all_reduce, chip_of
from ascend_ops.router.validate import faults
from fastattn.collectives.matmul_sum import MatmulSum
from fastattn.parallel import group
from fastattn.parallel.policies import policy_from_json, policy_to_json
from fastattn.spec import Point, TPGroup
from tests.models.builders import hf_model, save_hf
from tests.parallel.ranks import Ranks

from .schemas import ask

LAYERS, TILES, HALVES = 2, 2, 2
SIZES = {"max_position_embeddings": 1024, "hidden_size": 64, "intermediate_size": 160}


@pytest.fixture(scope="module")
def prefill(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[list[Invocation]]]:
    """What each rank says, and its calls."""
    folder = tmp_path_factory.mktemp("ranks")
    save_hf(hf_model("llama", dtype=torch.float16, num_hidden_layers=LAYERS, **SIZES), folder / "model")
    program = Path(__file__).with_name("collective_rank.py")
    env = {"FASTATTN_SHARED_MEMORY": "0"}  # which NPUs' ranks have not
    with Ranks(program, [str(folder / "model"), str(folder)], 2, folder, env=env) as ranks:
        statuses = ranks.wait(240)
        assert set(statuses.values()) == {0}, ranks.everything()
        facts = [json.loads(ranks.out(r).splitlines()[-1]) for r in range(2)]
    calls = [pickle.loads((folder / f"calls{r}.pickle").read_bytes()) for r in range(2)]  # noqa: S301
    return facts, [[Invocation(*c, lambda found: found) for c in of_rank] for of_rank in calls]


def test_each_tile_is_one_call(prefill):
    """Two tiles a half-block, on every layer, in the same order on both ranks; no all-reduce beside them."""
    facts, calls = prefill
    expected = LAYERS * HALVES * TILES
    for fact, of_rank in zip(facts, calls, strict=True):
        assert fact["calls"] == len(of_rank) == expected
        assert fact["counts"]["mm_all_reduce"] == expected
        assert "all_reduce" not in fact["counts"]
        assert {i.args[0].shape[0] for i in of_rank} == {300}
    inner = [tuple(i.args[1].shape[0] for i in pair) for pair in zip(*calls, strict=True)]
    assert inner == [(32, 32)] * TILES + [(96, 64)] * TILES + [(32, 32)] * TILES + [(96, 64)] * TILES


def test_sums_equal_the_exact_policys(prefill):
    facts, _ = prefill
    assert facts[0]["error"] <= 4 * torch.finfo(torch.float16).eps


def test_short_forwards_are_not_fused(prefill):
    """Three tokens: nothing would overlap, so matmul and all-reduce stay apart."""
    facts, _ = prefill
    assert facts[0]["later"] == 0


def test_calls_keep_to_the_operators_rules(prefill):
    assert [faults(i) for of_rank in prefill[1] for i in of_rank] == [[]] * (2 * LAYERS * HALVES * TILES)


@pytest.mark.toolchain
def test_calls_match_torch_npus_schema(prefill):
    calls = [i for of_rank in prefill[1] for i in of_rank]
    bad = calls[0]._replace(kwargs={**calls[0].kwargs, "reduce": "sum"})
    *answers, refused = ask([*calls, bad])
    for i, answer in zip(calls, answers, strict=True):
        assert answer.get("outputs") == [[[300, 64], "float16"]], (i.name, answer)
    assert "reduce" in refused["error"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, ""),
        ({"rows": 255}, "fewer than two tiles"),
        ({"world": 16}, "1, 2, 4 and 8 cards"),
        ({"dtype": torch.float32, "weight_dtype": torch.float32}, "float16 and bfloat16"),
        ({"weight_dtype": torch.bfloat16}, "float16 and bfloat16"),
        ({"chip": chip_of("910_93")}, "does not exist on 910_93"),
    ],
)
def test_rule(change, text):
    usual = {
        "rows": 256,
        "dtype": torch.float16,
        "weight_dtype": torch.float16,
        "world": 8,
        "chip": chip_of("910b"),
    }
    found = all_reduce.reasons(**{**usual, **change})
    assert bool(found) == bool(text)
    assert text in "".join(found)


def test_policy_needs_hccl_and_is_json():
    g = TPGroup(None, 0, 2, 60.0, (0.5, 0.5))
    assert "HCCL" in MatmulSum().reasons(Point(0, "attn", "prefill"), 300, 64, torch.float16, g)[0]
    assert MatmulSum().reasons(Point(0, "attn", "prefill"), 300, 64, torch.float16, group.single()) == []
    value = {"name": "tiled", "of": {"name": "matmul_sum"}}
    assert policy_to_json(policy_from_json(value)) == value
