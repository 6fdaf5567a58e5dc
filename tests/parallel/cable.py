"""Two machines, as network namespaces joined by a cable that can be cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from fastattn.spec import Link
from lib.network import Network, Unavailable, network

FAST = Link(0.0, 1.25e9)


@contextmanager
def laid(ranks: int = 2, link: Link = FAST, jitter_s: float = 0.0) -> Iterator[Network]:
    """Cables for one test, which is skipped where there can be none."""
    with ExitStack() as stack:
        try:
            cable = stack.enter_context(network(ranks, link, jitter_s))
        except Unavailable as reason:
            pytest.skip(str(reason))
        yield cable
