"""What the documents say works: snippets run, commands run, targets and files exist, tables are complete."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from fastattn.cli import parser
from fastattn.dispatch import BACKENDS
from fastattn.settings import Settings

from .markdown import DOCUMENTS, ROOT, Block, blocks, commands

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", blocks("python"), ids=Block.name)
def test_python_snippet_runs(block: Block) -> None:
    code = compile("\n" * block.line + block.text, str(block.path), "exec")
    exec(code, {"__name__": "__main__"})  # noqa: S102 - our own documents


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(c, id=i, marks=[] if i.startswith("README") else [pytest.mark.slow])
        for i, c in commands()
        if not c.startswith("make ")
    ],
)
def test_command_runs(command: str) -> None:
    """In a shell where `python`, `fastattn` and `torchrun` are those of this interpreter."""
    python = sys.executable
    functions = (
        f'python() {{ "{python}" "$@"; }}; '
        f'fastattn() {{ "{python}" -m fastattn "$@"; }}; '
        f'torchrun() {{ "{python}" -m torch.distributed.run "$@"; }}; '
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shell = ["bash", "-euo", "pipefail", "-c", functions + command]
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(shell, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10, "the command printed nothing to speak of"


def test_commands_that_cannot_run_here_parse() -> None:
    """Lines of `text` blocks that name a model to come, or hardware to be had."""
    texts = [line for block in blocks("text") for line in block.text.splitlines()]
    lines = [line.split("#")[0] for line in texts if re.search(r"(^|-m )fastattn ", line)]
    assert len(lines) >= 4
    for line in lines:
        words = shlex.split(line)
        args = parser().parse_args(words[words.index("fastattn") + 1 :])
        assert callable(args.run)


def test_make_targets_exist() -> None:
    """Every `make target` that a document names, in code, is one."""
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    quoted = re.findall(r"`make ([a-z][a-z-]*)", text)
    named = {*quoted, *(c.split()[1] for _, c in commands() if c.startswith("make "))}
    targets = set(re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "bench", "test", "test-all", "bench-peers", "lint", "wheel"} <= targets
    assert named - targets == set()
    assert {"bench", "test"} <= named


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_exist(path) -> None:  # type: ignore[no-untyped-def]
    """Links, and paths in backticks that start with a folder of the repository."""
    text = path.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:fastattn|bench|tests|docs|ascend_ops|cuda_volta)/[\w./-]*)`", text):
        assert (ROOT / target).exists(), target


def test_environment_variables_are_listed() -> None:
    rows = re.findall(r"^\| `(FASTATTN_\w+)` \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    assert rows == Settings.describe()


def test_every_backend_is_in_the_matrix() -> None:
    listed = re.findall(r"^\| `(\w+)` \| .* \| .* \|$", README, re.MULTILINE)
    assert set(BACKENDS) <= set(listed)
