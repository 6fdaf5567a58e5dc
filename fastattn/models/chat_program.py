"""The process that renders one chat template in Jinja's sandbox: a request on stdin, the answer on stdout.

A template is a program that comes with a model. The sandbox keeps it from Python and the system, the limits
of this process from all memory and endless loops, whichever of Jinja's many ways it takes. `chat` starts
this file by itself, with neither fastattn nor torch.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """transformers' tag around the words of the assistant, for training: here its body is all it is."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja's own class

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(Exception):
    """The template called raise_exception."""


def _refuse(message: object) -> NoReturn:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own escapes <, > and & for HTML, which is not what models were trained on
    options.setdefault("ensure_ascii", False)
    return json.dumps(value, indent=indent, **options)


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _answer(source: str, values: dict[str, Any], characters: int) -> dict[str, str]:
    """The text, or under another key why there is none."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        template = environment.from_string(source)
    except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
        return {"broken": f"is not a valid template: {error}"}
    pieces: list[str] = []
    try:
        for piece in template.generate(values):
            pieces.append(piece)
            characters -= len(piece)
            if characters < 0:
                return {"broken": "makes too long a text"}
        return {"text": "".join(pieces)}
    except _Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # noqa: BLE001 - whatever its program does wrong
        return {"broken": f"failed on these messages: {str(error) or type(error).__name__}"}


def main() -> None:
    text = sys.stdin.read()
    request = json.loads(text)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, request["bytes"] + 16 * len(text))  # what was asked does not count
    _limit(resource.RLIMIT_CPU, request["seconds"])
    try:
        text = json.dumps(_answer(request["source"], request["values"], request["characters"]))
    except MemoryError:
        text = json.dumps({"broken": "takes too much memory on these messages"})
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
