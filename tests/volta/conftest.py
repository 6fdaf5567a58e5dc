from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastattn import dispatch
from fastattn.backends import volta


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend as FASTATTN_EMULATE=volta makes it: it also takes tensors on the CPU."""
    caches = (dispatch.load_backend, dispatch.unavailable, dispatch.op_table)
    monkeypatch.setattr(volta, "_EMULATED", True)
    monkeypatch.setattr(volta, "BACKEND", volta.BACKEND._replace(device_types=("cuda", "cpu")))
    monkeypatch.setattr(dispatch, "_resolved", {})
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
