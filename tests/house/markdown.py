"""Fenced code blocks of the repository's Markdown files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "ascend_ops/*.md", "cuda_volta/*.md")
    for path in ROOT.glob(pattern)
)


class Block(NamedTuple):
    """One fenced block."""

    path: Path
    line: int
    language: str
    text: str

    def name(self) -> str:
        """As a test id: file and line."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    """All blocks of ``language`` in all documents."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(path, line, match.group(1), match.group(2)))
    return [block for block in found if block.language == language]


def commands() -> list[tuple[str, str]]:
    """(test id, command) of each line of the `sh` blocks, without comments."""
    return [
        (f"{block.name()}+{n}", line.split("  #")[0].strip())
        for block in blocks("sh")
        for n, line in enumerate(block.text.splitlines(), 1)
        if line.strip()
    ]
