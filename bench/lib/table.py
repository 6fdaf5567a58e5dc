"""A table on the terminal whose rows appear as they are measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Column(NamedTuple):
    """Title, width (of the widest value expected), and format of numbers; None is shown as "-"."""

    title: str
    width: int
    format: str = ""


class Table:
    """Right-aligned columns, two spaces apart."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = [c._replace(width=max(c.width, len(c.title))) for c in columns]

    def header(self) -> str:
        """Titles over a rule."""
        titles = "  ".join(c.title.rjust(c.width) for c in self.columns)
        return f"{titles}\n{'-' * len(titles)}"

    def row(self, *values: float | str | None) -> str:
        """One line; as many values as columns."""
        cells = []
        for c, value in zip(self.columns, values, strict=True):
            text = "-" if value is None else value if isinstance(value, str) else format(value, c.format)
            cells.append(text.rjust(c.width))
        return "  ".join(cells)
