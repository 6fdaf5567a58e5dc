"""Models on several ranks: the same logits and tokens, by every launcher, and a clear end when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models.load import load
from fastattn.models.sampling import SamplingParams
from tests.models.builders import hf_model, save_hf
from tests.parallel.ranks import ROOT, Ranks, free_port

HERE = Path(__file__).resolve().parent
PROMPT = "The three largest cities of France are"
TOKENS = 16


@pytest.fixture(scope="module")
def single() -> tuple[list[int], list[int], torch.Tensor]:
    """Prompt ids, generated ids and the prompt's logits of one process."""
    model = load("smollm2", dtype="fp32")
    (done,) = model.generate([PROMPT], SamplingParams(max_tokens=TOKENS))
    ids = done.prompt_ids + done.token_ids
    return ids, done.token_ids, model.logits([ids])[0]


def generate_arguments(*more: str) -> list[str]:
    fixed = ["--prompt", PROMPT, "--max-tokens", str(TOKENS), "--dtype", "fp32", "--json"]
    return ["generate", "smollm2", *fixed, *more]


@pytest.mark.parametrize(
    ("world", "split"),
    [
        (2, "1,2"),
        (3, ""),
        *(pytest.param(world, "", marks=pytest.mark.slow) for world in (2, 4, 5)),
    ],
    ids=lambda v: str(v).replace(",", ":") or "even",
)
def test_logits_equal_one_rank(world: int, split: str, single: tuple, tmp_path: Path) -> None:
    """N = 2 gives 6 + 3 query heads; from 4 on, KV heads are replicated and cut unevenly."""
    ids, _, wanted = single
    out = tmp_path / "logits.pt"
    arguments = [split, ",".join(map(str, ids)), "smollm2", str(out)]
    with Ranks(HERE / "dump_logits.py", arguments, world, tmp_path) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.everything()
    found = torch.load(out)
    assert (found - wanted).abs().max() < 1e-3
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_logits_of_every_family_equal_one_rank(tmp_path: Path) -> None:
    """Biases, norms of heads, windows and tied embeddings, cut; the MLP is too narrow for blocks of 32."""
    configs: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": True, "mlp_bias": True},
        "mistral": {},
        "qwen2": {},
        "qwen3": {"tie_word_embeddings": True},
    }
    ids = torch.randint(3, 320, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    arguments = ["", ",".join(map(str, ids))]
    for family, overrides in configs.items():
        model = hf_model(family, seed=3, intermediate_size=48, **overrides)
        arguments += [str(save_hf(model, tmp_path / family)), str(tmp_path / f"{family}.pt")]
    with Ranks(HERE / "dump_logits.py", arguments, 3, tmp_path) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.everything()
    for family in configs:
        wanted = load(tmp_path / family, dtype="fp32").logits([ids])[0]
        assert (torch.load(tmp_path / f"{family}.pt") - wanted).abs().max() < 1e-4, family


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments, "-m", "fastattn"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command + generate_arguments(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tokens_of(process: subprocess.Popen[str]) -> list[int]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.strip().splitlines()[-1])["completions"][0]["token_ids"]


def test_torchrun_gives_the_same_tokens(single: tuple) -> None:
    assert tokens_of(torchrun("--nproc-per-node", "2", "--master-port", str(free_port()))) == single[1]


@pytest.mark.slow
def test_torchrun_on_two_nodes_gives_the_same_tokens(single: tuple) -> None:
    shared = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
    port = str(free_port())
    first, second = (torchrun(*shared, "--master-port", port, "--node-rank", str(n)) for n in (0, 1))
    assert tokens_of(first) == single[1]
    out, err = second.communicate(timeout=60)
    assert (second.returncode, out) == (0, ""), err


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_killed_rank_ends_generation_within_5_s(victim: int, tmp_path: Path) -> None:
    arguments = ["generate", "smollm2", "--prompt", PROMPT, "--max-tokens", "4000", "--ignore-eos"]
    with Ranks(HERE / "program.py", arguments, 3, tmp_path) as ranks:
        deadline = time.monotonic() + 90
        while len(ranks.out(0)) < 20:  # text is being streamed: every rank is in the middle of generating
            assert time.monotonic() < deadline, ranks.everything()
            time.sleep(0.05)
        ranks.kill(victim)


def test_ranks_that_load_different_models_are_refused(tmp_path: Path) -> None:
    per_rank = [{"RANK_DTYPE": "fp32"}, {"RANK_DTYPE": "bf16"}]
    program = tmp_path / "differ.py"
    program.write_text(
        "import os, sys\n"
        "from fastattn.cli import main\n"
        "sys.exit(main(['generate', 'smollm2', '--prompt', 'x', '--dtype', os.environ['RANK_DTYPE']]))\n"
    )
    with Ranks(program, [], 2, tmp_path, per_rank=per_rank) as ranks:
        assert ranks.wait(60) == {0: 1, 1: 1}, ranks.everything()
        assert "the dtype" in ranks.err(0)
