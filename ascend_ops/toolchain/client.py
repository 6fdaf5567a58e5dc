"""Starts workers in the environment that has triton-ascend, and calls functions there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Timer
from types import TracebackType
from typing import Any


class ToolchainError(RuntimeError):
    """A call in a worker failed, or the worker died; says what it wrote."""


class Worker:
    """One process; it loads triton-ascend once and answers many calls. Use as a context manager."""

    def __init__(self, python: Path, path: Sequence[Path]) -> None:
        """``python`` is that of the environment, ``path`` what its PYTHONPATH becomes."""
        environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environ["PYTHONPATH"] = os.pathsep.join(map(str, path))
        self._process = subprocess.Popen(
            [str(python), "-m", "ascend_ops.toolchain.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
            text=True,
        )

    def call(self, function: str, timeout_s: float = 300.0, **arguments: Any) -> Any:
        """The result of ``"module:function"`` there. Raises ToolchainError."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        watchdog = Timer(timeout_s, self._process.kill)
        watchdog.start()
        try:
            stdin.write(json.dumps({"call": function, "arguments": arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise ToolchainError(f"{function}: the worker died or took more than {timeout_s:g} s")
        answer = json.loads(line)
        if "error" in answer:
            raise ToolchainError(f"{function}({arguments}):\n{answer['error']}")
        return answer["result"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def call_all(
    python: Path, path: Sequence[Path], function: str, calls: Sequence[Mapping[str, Any]], workers: int = 2
) -> list[Any]:
    """The results of many calls, in order, by ``workers`` processes. Raises ToolchainError."""
    idle: SimpleQueue[Worker] = SimpleQueue()

    def call(arguments: Mapping[str, Any]) -> Any:
        worker = idle.get()
        try:
            return worker.call(function, **arguments)
        finally:
            idle.put(worker)

    started = [Worker(python, path) for _ in range(workers)]
    try:
        for worker in started:
            idle.put(worker)
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(call, calls))
    finally:
        for worker in started:
            worker.__exit__(None, None, None)
