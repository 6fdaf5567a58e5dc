from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cuda_volta import runtime
from fastattn import dispatch
from fastattn.backends import volta


@pytest.fixture(autouse=True)
def _ptx_as_before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test allows to newer GPUs ends with it; those that take a ``device`` allow them the PTX."""
    allowed = runtime._ptx_on_newer or "device" in request.fixturenames  # noqa: SLF001
    monkeypatch.setattr(runtime, "_ptx_on_newer", allowed)


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


@pytest.fixture(scope="session", params=["emulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run: emulated, and on a GPU where there is one, newer ones through PTX."""
    if request.param == "emulator":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    return torch.device("cuda", torch.cuda.current_device())
