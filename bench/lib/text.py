"""Real prose, so that tokens have the statistics of text: prompts of any length, and two long texts.

The long ones come with Python and share no passages, so that a model can be calibrated on one and measured
on the other.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

TEXT = """
The canal had been dug by hand, two hundred years before, to carry slate from the quarries down to the
sea. Nobody had moved slate on it for a lifetime. The towpath was now a walk for people with dogs, and
the last lock keeper's cottage sold tea and maps on summer weekends. Still, every spring, an engineer
named Ruth Almond came out from the county office with a measuring rod and a notebook, because water does
not care whether it is useful. It presses on the banks with the same weight, finds the same cracks, and
freezes in them at the same temperature. In a dry year she wrote down how far the level had fallen below
the copper nail that her predecessor had hammered into the coping stone. In a wet year she counted the
places where the grass was a darker green than it ought to be, since a bank that leaks waters the field
behind it first and gives way later. Once, after a week of rain in October, she found a hole the size of
a coin at the foot of the embankment, with clear water running out of it. Clear water was good news: it
meant that nothing was being carried away. She marked the spot with a cane, sat down on the wet grass,
and watched the hole for three hours, until she was certain that the water would stay clear. Then she
drove to the nearest village, asked for the man who owned the excavator, and told him what she needed:
forty tonnes of clay, by morning, and no arguments about the price. Years later, when the new reservoir
was planned, people asked her which of the old works could be trusted. She opened the notebooks on the
table. There was no theory in them, only dates, levels, weather and small drawings, but anyone who read
from the first page to the last could see the valley breathing. The members of the committee read for an
hour without speaking. Then one of them asked whether she had ever thought of publishing it. She said
that she had always assumed it was published already, since it had been lying on a shelf in a public
office, under its proper heading, where anybody could have asked for it.
"""

_LONG = 200  # characters of a docstring that says more than its function's name


def prompts(tokens: Sequence[int], batch: int, length: int) -> list[list[int]]:
    """``batch`` prompts of ``length`` tokens of a text that repeats; each starts at another place of it."""
    step = max(1, len(tokens) // batch)
    starts = [(b * step) % len(tokens) for b in range(batch)]
    repeated = list(tokens) * (2 + length // len(tokens))
    return [repeated[start : start + length] for start in starts]


def reference() -> str:
    """The language reference, as `help` shows it: some 110,000 tokens of prose with a little code."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def docstrings() -> str:
    """The longer docstrings of the standard library's modules of one file: some 180,000 tokens."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                doc = ast.get_docstring(node) or ""
                found += [doc] if len(doc) > _LONG else []
    return "\n\n".join(found)
