"""``fastattn`` commands as forks of one process that has imported all of it, which takes longer than they do.

What a fork does is what the program does: its own exit status, stdout and stderr. As a program, this file
answers each request on stdin, {"arguments", "folder", "out", "err"} as JSON, by the exit status on stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]


class Forks:
    """Runs commands; closed at the end of a ``with`` block."""

    def __init__(self, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def run(self, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run`, with nothing on stdin."""
        words = list(map(str, arguments))
        request = {
            "arguments": words, "folder": str(folder or Path.cwd()), "out": str(self._out),
            "err": str(self._err),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return subprocess.CompletedProcess(words, status, self._out.read_text(), self._err.read_text())


def serve() -> None:
    import fastattn.models.load
    import fastattn.models.quantize  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _command(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _command(arguments: list[str], folder: str, out: str, err: str) -> NoReturn:
    from fastattn.cli import main

    os.chdir(folder)
    for descriptor, path in enumerate(("/dev/null", out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    try:
        status = main(arguments)
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
