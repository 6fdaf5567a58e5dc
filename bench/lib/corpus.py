"""Two different texts that come with Python: one to score models on, one to calibrate on."""

from __future__ import annotations

import inspect
from importlib import import_module
from pydoc_data.topics import topics

from fastattn.models.tokenizer import Tokenizer

MODULES = (
    "argparse", "collections", "concurrent.futures", "configparser", "csv", "datetime", "decimal",
    "difflib", "doctest", "email.message", "enum", "fractions", "functools", "http.client", "inspect", "json",
    "logging", "mailbox", "multiprocessing.pool", "optparse", "pathlib", "pickle", "random", "shelve",
    "smtplib", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "unittest", "urllib.request", "uuid", "xml.dom.minidom", "zipfile",
)  # fmt: skip
SHORTEST = 200  # characters of a docstring that is prose


def reference() -> str:
    """The language reference (pydoc_data.topics): English prose with some code, about 113,000 tokens."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def docstrings() -> str:
    """Docstrings of modules, classes and functions of the standard library."""
    found: dict[str, None] = {}
    for module in map(import_module, MODULES):
        for item in (module, *(value for _, value in sorted(vars(module).items()))):
            if item is module or inspect.isclass(item) or inspect.isfunction(item):
                found[inspect.getdoc(item) or ""] = None
    return "\n\n".join(text for text in found if len(text) >= SHORTEST)


def chunks(tokenizer: Tokenizer, text: str, context: int, count: int) -> list[list[int]]:
    """``count`` pieces of a text of ``context`` tokens, evenly over it, each begun as texts begin."""
    begin = tokenizer.encode("")
    tokens = tokenizer.encode(text, add_special=False)
    length = context - len(begin)
    if length < 2 or count * length > len(tokens):
        raise SystemExit(f"--context, --chunks: {context} x {count}, the text has {len(tokens)} tokens")
    step = (len(tokens) - length) / max(1, count - 1)
    return [[*begin, *tokens[int(i * step) : int(i * step) + length]] for i in range(count)]
