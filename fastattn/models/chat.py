"""Chat templates: Jinja programs that come with a model, run in Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..spec import CheckpointError

_TEXT_LIMIT = 64 << 20  # characters; a template that loops must end somewhere
_SOURCE_LIMIT = 1 << 20
_POWER_BITS = 1 << 12


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which already bounds range(), with a bound on what one product or power can make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        for value, times in ((left, right), (right, left)):
            if hasattr(value, "__len__") and isinstance(times, int) and len(value) * times > _TEXT_LIMIT:
                raise SecurityError(f"a result of {len(value)} times {times} is too long")
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right)
            if bits > _POWER_BITS:
                raise SecurityError(f"a power of {bits} bits is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """transformers' tag around the words of the assistant, for training: here its body is all it is."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja's own class

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One template, compiled. It sees the messages and the special tokens, and no Python."""

    def __init__(self, path: object, source: str) -> None:
        self.path = path
        if len(source) > _SOURCE_LIMIT:
            raise CheckpointError(path, f"has {len(source)} characters, too long", "chat_template")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, SyntaxError, ValueError, MemoryError) as error:
            raise CheckpointError(path, f"is not a valid template: {error}", "chat_template") from error

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, special: Mapping[str, str]
    ) -> str:
        """The prompt. ValueError: the template refuses the messages; CheckpointError: it is broken."""
        checked = [_check(i, m) for i, m in enumerate(messages)]
        pieces: list[str] = []
        length = 0
        try:
            # Templates tell "no tools" from "tools is not defined", and transformers defines it.
            for piece in self._template.generate(
                messages=checked,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > _TEXT_LIMIT:
                    raise CheckpointError(
                        self.path, f"made more than {_TEXT_LIMIT} characters", "chat_template"
                    )
        except _Refused as error:
            raise ValueError(f"messages: refused by the chat template: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # whatever its program does wrong
            raise CheckpointError(self.path, f"failed on these messages: {error}", "chat_template") from error
        return "".join(pieces)


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


def _check(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if (
        not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or "content" not in message
    ):
        raise ValueError(f"messages[{index}]: {message!r:.80}, expected a mapping with role and content")
    return dict(message)
