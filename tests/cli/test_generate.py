"""``fastattn generate`` as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.builders import hf_model, save_hf


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(hf_model("llama", seed=7), tmp_path_factory.mktemp("model"))


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastattn", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_smollm2_chat_answers() -> None:
    done = run("generate", "smollm2", "--chat", "--prompt", "What is the capital of France?", "--max-tokens", 16)
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
    assert done.stderr == ""


def test_json_of_a_batch(directory: Path) -> None:
    done = run("generate", directory, "--prompt", "The quick", "--prompt", "In the beginning there", "--max-tokens",
               5, "--ignore-eos", "--json", "--threads", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["dtype"], facts["ranks"], facts["threads"]) == ("float32", 1, 1)
    assert [len(c["token_ids"]) for c in facts["completions"]] == [5, 5]
    assert all(c["finish_reason"] == "length" for c in facts["completions"])


def test_prompt_from_stdin(directory: Path) -> None:
    options = ("generate", directory, "--max-tokens", 5, "--ignore-eos", "--json")
    given = json.loads(run(*options, "--prompt", "The quick").stdout)["completions"][0]
    piped = json.loads(run(*options, stdin="The quick\n").stdout)["completions"][0]
    assert piped["token_ids"] == given["token_ids"]


def test_batch_as_text(directory: Path) -> None:
    done = run("generate", directory, "--prompt", "The", "--prompt", "In", "--max-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--- The\n")
    assert "\n--- In\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nonexistent"], "fastattn: error: /nonexistent: no such file or directory"),
        (["MODEL", "--dtype", "int3"], "fastattn: error: dtype: 'int3', expected auto"),
        (["MODEL", "--backend", "volta"], "fastattn: error: "),
        (["MODEL", "--backend", "abacus"], "no backend 'abacus'; there are: volta"),
        (["MODEL", "--temperature", "-1"], "fastattn: error: temperature: -1.0"),
        (["MODEL", "--threads", "0"], "fastattn: error: threads: 0, expected at least 1"),
        (["MODEL", "--split", "1,2"], "fastattn: error: split: 2 shares"),
        (["MODEL", "--system", "Be brief."], "fastattn: error: --system: needs --chat"),
        (["MODEL", "--prompt", ""], r"fastattn: error: prompts[1]: no tokens"),
    ],
    ids=lambda v: v[-1].strip("-/") if isinstance(v, list) else "",
)
def test_errors_are_one_line(directory: Path, arguments: list[str], message: str) -> None:
    arguments = [str(directory) if a == "MODEL" else a for a in arguments]
    done = run("generate", *arguments, "--prompt", "The quick")
    if arguments[-2:] == ["--prompt", ""]:
        done = run("generate", str(directory), "--prompt", "The quick", "--prompt", "")
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_bad_split_text(directory: Path) -> None:
    done = run("generate", directory, "--prompt", "x", "--split", "one,two")
    assert done.returncode == 2
    assert "'one,two', expected numbers such as 2,1" in done.stderr
