from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from fastattn import native
from fastattn.spec import Op

from .runners import RUNNERS, table


@pytest.fixture(params=RUNNERS)
def ops(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Op]]:
    """The op table of each runner in turn."""
    before = native.isa()
    yield table(request.param)
    native.set_isa(before)


@pytest.fixture(params=[r for r in RUNNERS if r != "torch"])
def native_ops(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Op]]:
    before = native.isa()
    yield table(request.param)
    native.set_isa(before)
