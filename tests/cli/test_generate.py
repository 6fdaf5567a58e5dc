"""``fastattn generate`` as a user calls it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from tests.cli.forks import Forks
from tests.models.builders import CHAT_TEMPLATE, SPECIALS, byte_level_tokenizer, hf_model, save_hf


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = hf_model("llama", seed=7, max_position_embeddings=1 << 16)
    return save_hf(model, tmp_path_factory.mktemp("model"))


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastattn", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_smollm2_chat_answers() -> None:
    done = run(
        "generate", "smollm2", "--chat", "--prompt", "What is the capital of France?", "--max-tokens", 16
    )
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
    assert done.stderr == ""


def test_json_of_a_batch(directory: Path) -> None:
    prompts = ("--prompt", "The quick", "--prompt", "In the beginning there")
    done = run("generate", directory, *prompts, "--max-tokens", 5, "--ignore-eos", "--json", "--threads", 1)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["dtype"], facts["act"], facts["ranks"], facts["threads"]) == ("float32", "", 1, 1)
    assert [len(c["token_ids"]) for c in facts["completions"]] == [5, 5]
    assert all(c["finish_reason"] == "length" for c in facts["completions"])


def test_prompt_from_stdin(directory: Path) -> None:
    options = ("generate", directory, "--max-tokens", 5, "--ignore-eos", "--json")
    given = json.loads(run(*options, "--prompt", "The quick").stdout)["completions"][0]
    piped = json.loads(run(*options, stdin="The quick\n").stdout)["completions"][0]
    assert piped["token_ids"] == given["token_ids"]


def test_int8_activations(directory: Path) -> None:
    done = run("generate", directory, "--prompt", "The quick", "--max-tokens", 2, "--act", "int8", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["act"] == "int8"


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
        (["MODEL", "--act", "int3"], "fastattn: error: act: 'int3', expected '' or 'int8'"),
        (["MODEL", "--backend", "volta"], "fastattn: error: "),
        (["MODEL", "--backend", "abacus"], "no backend 'abacus'; there are: volta"),
        (["MODEL", "--temperature", "-1"], "fastattn: error: temperature: -1.0"),
        (["MODEL", "--threads", "0"], "fastattn: error: threads: 0, expected at least 1"),
        (["MODEL", "--threads", "99999999999"], "fastattn: error: threads: 99999999999, expected at least 1"),
        (["MODEL", "--device", "meta"], "fastattn: error: --device: 'meta', expected a device that computes"),
        (["MODEL", "--split", "1,2"], "fastattn: error: split: 2 shares"),
        (["MODEL", "--system", "Be brief."], "fastattn: error: --system: needs --chat"),
        (["MODEL", "--prompt", ""], "fastattn: error: prompts[1]: no tokens"),
        (["MODEL", "--device", "abacus"], "fastattn: error: device: 'abacus', expected one that torch sees"),
    ],
    ids=lambda v: v[-1].strip("-/") if isinstance(v, list) else "",
)
def test_errors_are_one_line(directory: Path, forks: Forks, arguments: list[str], message: str) -> None:
    arguments = [str(directory) if a == "MODEL" else a for a in arguments]
    done = forks.run("generate", "--prompt", "The quick", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_of_the_whole_program() -> None:
    done = run("generate", "/nonexistent", "--prompt", "The quick")
    wanted = "fastattn: error: /nonexistent: no such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", wanted)


def start(*arguments: object, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "fastattn", *map(str, arguments)], text=True, **streams)


def endless(directory: Path, tokens: int = 60000) -> tuple[object, ...]:
    """A command that prints more than a pipe holds, so that it lives until its reader is done with it."""
    return ("generate", directory, "--prompt", "The", "--max-tokens", tokens, "--ignore-eos", "--threads", 1)


@pytest.mark.parametrize("command", ["generate", "info"])
def test_a_reader_that_leaves_ends_it_as_sigpipe_would(directory: Path, command: str) -> None:
    arguments = endless(directory) if command == "generate" else ("info",)
    with start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if command == "generate":
            assert process.stdout.read(5)
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
        assert process.stderr.read() == ""


def test_ctrl_c(directory: Path) -> None:
    with start(*endless(directory), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 128 + signal.SIGINT
        assert process.stderr.read() == ""


def test_closed_stdin(directory: Path) -> None:
    command = f"exec {sys.executable} -m fastattn generate {directory} <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "fastattn: error: --prompt: not given, and stdin is closed\n"


def test_closed_stdout(directory: Path) -> None:
    command = f"exec {sys.executable} -m fastattn generate {directory} --prompt The --max-tokens 2 >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("more", [(), ("--json",)], ids=["stream", "json"])
def test_full_disk(directory: Path, more: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        process = start(*endless(directory, 500), *more, stdout=full, stderr=subprocess.PIPE)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert err.startswith("fastattn: error: ")
    assert "No space left on device" in err
    assert len(err.splitlines()) == 1


def test_chat_prompts_hold_what_the_template_wrote(tmp_path: Path) -> None:
    """Only that: a tokenizer that begins every text with a token does not do so here (as transformers)."""
    directory = save_hf(hf_model("llama", seed=7), tmp_path)
    core = byte_level_tokenizer()
    core.post_processor = TemplateProcessing(single=f"{SPECIALS[0]} $A", special_tokens=[(SPECIALS[0], 0)])
    core.save(str(directory / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT_TEMPLATE)
    message = {"role": "user", "content": "The quick"}
    wanted = theirs.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
    for options, ids in ((("--chat",), wanted), ((), theirs("The quick")["input_ids"])):
        done = run("generate", directory, "--prompt", "The quick", "--max-tokens", 1, "--json", *options)
        assert json.loads(done.stdout)["completions"][0]["prompt_ids"] == ids, done.stderr


def test_bad_split_text(directory: Path, forks: Forks) -> None:
    done = forks.run("generate", directory, "--prompt", "x", "--split", "one,two")
    assert done.returncode == 2
    assert "'one,two', expected numbers such as 2,1" in done.stderr
