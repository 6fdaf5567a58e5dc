"""Where kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ascend_ops import launch


def test_the_device_is_that_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the thread's current one; and that is the current one again afterwards."""
    current, seen = [torch.device("cuda:0")], []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted)
        yield
        current.pop()

    class Function:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: seen.append((grid, args, kwargs, current[-1]))

    monkeypatch.setattr(launch, "jit", lambda name: Function())
    monkeypatch.setattr(torch.cuda, "device", device)
    launch.kernel("swiglu:swiglu_kernel", torch.device("cuda:1"))[(3,)](1, n=2)
    assert seen == [((3,), (1,), {"n": 2}, torch.device("cuda:1"))]
    assert current == [torch.device("cuda:0")]
