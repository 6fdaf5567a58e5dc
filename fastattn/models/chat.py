"""Chat templates: Jinja programs that come with a model, run in a process that can do no harm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..spec import CheckpointError

_SOURCE_LIMIT = 1 << 20  # characters
_TEXT_LIMIT = 64 << 20
_BYTES = 1 << 30  # of address space, beside what the messages take
_SECONDS = 10  # of processor time; templates that mean well take milliseconds
# Isolated, as a file, and with the same libraries as this process.
_START = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_PROGRAM = Path(__file__).with_name("chat_program.py")


class ChatTemplate:
    """One template. It sees the messages and the special tokens, and no Python."""

    def __init__(self, path: object, source: str) -> None:
        self.path, self._source = path, source
        if len(source) > _SOURCE_LIMIT:
            raise CheckpointError(path, f"has {len(source)} characters, too long", "chat_template")

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special: Mapping[str, str]
    ) -> str:
        """The prompt. ValueError: the template refuses the messages; CheckpointError: it is broken."""
        values = {
            # Templates tell "no tools" from "tools is not defined", and transformers defines it.
            "tools": None,
            "documents": None,
            **special,
            "messages": [_check(i, m) for i, m in enumerate(messages)],
            "add_generation_prompt": add_generation_prompt,
        }
        answer = self._run(values)
        if "refused" in answer:
            raise ValueError(f"messages: refused by the chat template: {answer['refused']:.500}")
        if "broken" in answer:
            raise CheckpointError(self.path, f"{answer['broken']:.500}", "chat_template")
        return answer["text"]

    def _run(self, values: Mapping[str, Any]) -> dict[str, str]:
        request = {
            "source": self._source, "values": values,
            "characters": _TEXT_LIMIT, "seconds": _SECONDS, "bytes": _BYTES,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-I", "-c", _START, str(_PROGRAM), *sys.path],
            input=json.dumps(request), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode < 0:  # the system ended it
            reason = f"takes more than {_SECONDS} s or {_BYTES >> 20} MiB on these messages"
            raise CheckpointError(self.path, reason, "chat_template")
        if done.returncode:
            raise RuntimeError(f"{_PROGRAM.name} failed: {done.stderr[-2000:]}")
        answer: dict[str, str] = json.loads(done.stdout)
        return answer


def _check(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if (
        not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or "content" not in message
    ):
        raise ValueError(f"messages[{index}]: {message!r:.80}, expected a mapping with role and content")
    try:
        json.dumps(found := dict(message))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages[{index}]: {message!r:.80}, expected JSON values: {error}") from error
    return found
