"""``fastattn plan`` on real ranks: the plan it writes loads, and says what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastattn.parallel import plan as plans
from tests.cli.forks import Forks
from tests.models.builders import hf_model, save_hf
from tests.parallel.ranks import Ranks

PROGRAM = Path(__file__).resolve().parent / "program.py"
TEXT = "The quick brown fox jumps over the lazy dog, and then the dog sleeps. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", num_hidden_layers=3), tmp_path_factory.mktemp("model"))


def run(folder: Path, world: int, *arguments: str, fails: bool = False) -> tuple[str, str]:
    """Rank 0's stdout, and all ranks' stderr."""
    folder.mkdir(exist_ok=True)
    with Ranks(PROGRAM, arguments, world, folder) as ranks:
        assert set(ranks.wait(120).values()) == {int(fails)}, ranks.everything()
        assert not any(ranks.out(r) for r in range(1, world))
        return ranks.out(0), "\n".join(ranks.err(r) for r in range(world))


def tokens(folder: Path, model: Path, sync: str) -> list[int]:
    prompt = ("--prompt", "The quick brown fox", "--max-tokens", "20", "--ignore-eos")
    out, _ = run(folder, 2, "generate", str(model), *prompt, "--json", "--sync", sync)
    found: list[int] = json.loads(out)["completions"][0]["token_ids"]
    return found


@pytest.mark.slow
def test_a_plan_of_two_ranks_generates_the_same(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    sizes = ("--prefill-tokens", "70", "--batch", "2", "--budget", "0.5", "--threads", "1")
    out, _ = run(tmp_path / "a", 2, "plan", str(model), "--out", str(file), *sizes)
    for part in (
        "2 ranks, 1 threads each (asked for)", "link: ", "the backend's all_reduce: ", "half-blocks: attn ",
        "prefill, a prompt of 70 tokens", "decode, a step of 2 sequences", "model ms", "  chosen: ",
        f"written: {file}",
    ):  # fmt: skip
        assert part in out
    plan = plans.read(file)
    assert (plan.world, plan.split, len(plan.points), plan.quality) == (2, (0.5, 0.5), 12, {})
    assert all(p.exact for p in plan.points.values())
    assert tokens(tmp_path / "b", model, str(file)) == tokens(tmp_path / "c", model, "exact")


@pytest.mark.slow
def test_a_text_lets_lossy_formats_compete(model: Path, tmp_path: Path) -> None:
    file, text = tmp_path / "plan.json", tmp_path / "text.txt"
    text.write_text(TEXT)
    judged = ("--text", str(text), "--max-increase", "0.5", "--budget", "0.2", "--prefill-tokens", "40")
    out, _ = run(tmp_path / "a", 2, "plan", str(model), "--out", str(file), *judged)
    assert "perplexity under exact sums" in out
    quality = plans.read(file).quality
    assert quality["max_increase"] == 0.5
    assert set(quality["prefill"]) == {"increase", "standard_error"}
    assert len(tokens(tmp_path / "b", model, str(file))) == 20


def test_one_rank_gets_the_exact_plan_and_the_reason(model: Path, tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "plan.json"
    made = forks.run("plan", model, "--out", file, "--prefill-tokens", 64)
    assert made.stdout.count("chosen: exact (one rank has nothing to sum)") == 2, made.stderr
    assert {p.name for p in plans.read(file).points.values()} == {"exact"}
    prompt = ("--prompt", "The", "--max-tokens", "2", "--sync", str(file))
    assert forks.run("generate", model, *prompt).returncode == 0
    _, errors = run(tmp_path / "c", 2, "generate", str(model), *prompt, fails=True)
    assert "the plan is for 1 ranks, there are 2" in errors
    wider = hf_model("llama", num_hidden_layers=3, intermediate_size=192)
    other = save_hf(wider, tmp_path / "other")
    refused = forks.run("generate", other, *prompt)
    assert refused.returncode == 1
    assert "the plan is for another model" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prefill-tokens", "512"], "prefill_tokens: 512, expected 2 to 511, the model's context"),
        pytest.param(["--batch", "0"], "batch: 0, expected at least 1", marks=pytest.mark.slow),
        pytest.param(["--budget", "0"], "budget_s: 0.0, expected seconds > 0", marks=pytest.mark.slow),
        pytest.param(["--text", "none.txt"], "none.txt", marks=pytest.mark.slow),
        (["--text", "short.txt"], "too few for 2 chunks of 512"),
        pytest.param(
            ["--text", "long.txt", "--max-increase", "0"],
            "max_increase: 0.0, expected a positive share",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--threads", "0"], "threads: 0, expected at least 1", marks=pytest.mark.slow),
        (["--out", "none/plan.json"], "none: no such folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_refusals_are_one_line(arguments: list[str], reason: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "long.txt").write_text(TEXT)
    given = ("plan", str(model), "--out", "plan.json", "--prefill-tokens", "64", *arguments)
    _, errors = run(tmp_path, 2, *given, fails=True)
    assert any(line.startswith("fastattn: error: ") and reason in line for line in errors.splitlines())
    assert "Traceback" not in errors
    assert not (tmp_path / "plan.json").exists()
