"""Every test of the native kernels leaves the instruction set as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastattn import native


@pytest.fixture(autouse=True)
def _same_isa() -> Iterator[None]:
    before = native.isa()
    yield
    native.set_isa(before)
