"""Whole act-order models on 1, 2 and 3 ranks: the same tokens, and exactly two exchanges a block."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn.parallel.act_order import LAYOUTS
from tests.models.builders import hf_model
from tests.models.quantized import head_order, save_quantized
from tests.parallel.act_order_rank import PROMPTS
from tests.parallel.ranks import HERE, Ranks
from tests.quant.stored import Spec

LAYERS = 2
WORLDS = [1, 2, pytest.param(3, marks=pytest.mark.slow)]
Runs = Callable[[int], list[dict[str, Any]]]
ACT = Spec("gptq", 4, 16, act_order=True)
KINDS: dict[str, tuple[Spec, tuple[str, ...]]] = {
    "inside": (ACT, ()),  # o's act-order stays inside heads
    "global": (Spec("gptq", 3, 32, True, False, "v2"), ()),
    "partly": (ACT, ("0.mlp.up_proj", "1.self_attn.o_proj", "v_proj")),  # some layers dense
    "compressed": (Spec("compressed-tensors", 8, 32, True), ()),
    "awq": (Spec("awq", 4, 32, symmetric=False), ()),
}


def inside(name: str, inn: int) -> Tensor | None:
    return head_order(4, 2, 32, 16) if name.endswith("o_proj") else None


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Directories, and the logits that transformers computes from the same weights."""
    made = {}
    for kind, (spec, dense) in KINDS.items():
        model = hf_model("qwen2", hidden_size=128, num_hidden_layers=LAYERS, use_sliding_window=False)
        path = tmp_path_factory.mktemp(kind)
        order = inside if spec is ACT else lambda name, inn: None
        save_quantized(model, path, spec, dense=dense, order=order)
        with torch.inference_mode():
            made[kind] = path, [model(torch.tensor([ids])).logits[0] for ids in PROMPTS]
    return made


@pytest.fixture(scope="module")
def runs(models: dict[str, tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What each rank of a world says."""
    paths = [str(path) for path, _ in models.values()]

    @cache
    def of(world: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        with Ranks(HERE / "act_order_rank.py", paths, world, folder) as ranks:
            assert set(ranks.wait(240).values()) == {0}, ranks.everything()
            return [json.loads(ranks.out(r)) for r in range(world)]

    return of


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_exact_policy_gives_the_same_tokens(
    kind: str, world: int, models: dict[str, Any], runs: Runs
) -> None:
    path, _ = models[kind]
    alone = runs(1)[0][f"{path} tp_aware"]
    for rank in runs(world):
        for sync, tokens in rank[f"{path} policies"].items():
            assert tokens == alone["tokens"], sync


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_model(kind: str, layout: str, world: int, models: dict[str, Any], runs: Runs) -> None:
    path, wanted = models[kind]
    said = [rank[f"{path} {layout}"] for rank in runs(world)]
    for found, expected in zip(said[0]["logits"], wanted, strict=True):
        assert (torch.tensor(found) - expected).abs().max() < 1e-4 * expected.abs().max()
    alone = runs(1)[0][f"{path} tp_aware"]
    for rank in said:
        assert rank["tokens"] == alone["tokens"]
        gathers = LAYERS if layout == "naive" and kind != "awq" else 0
        sums = {"all_reduce": 2 * LAYERS + 1} if world > 1 else {}  # the embedding's among them
        assert rank["collectives"] == sums | ({"all_gather": gathers} if gathers and world > 1 else {})
        assert rank["down"] == (LAYERS if layout == "local_sort" and kind != "awq" else 0)
        if kind in ("awq", "inside"):
            assert rank["o"] == (0 if kind == "awq" or layout == "tp_aware" else LAYERS)
