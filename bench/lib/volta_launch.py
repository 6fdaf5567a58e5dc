"""The launches that the Volta library would make for a call, recorded instead of made."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cuda_volta.sass.paths import Launch
from cuda_volta.variant import Variant


class Recorded(NamedTuple):
    """One launch: what would run, and what it would be given."""

    variant: Variant
    launch: Launch


class _Recorder:
    """Stands where a loaded kernel would."""

    def __init__(self, variant: Variant, into: list[Recorded]) -> None:
        self.variant, self._into = variant, into

    def launch(
        self, grid: tuple[int, int, int], params: ctypes.Structure, *, reads: Sequence[Tensor] = (), **_: Any
    ) -> None:
        # Lengths and page tables decide where a kernel goes; the values of other tensors do not.
        memory = [
            (t.data_ptr(), ctypes.string_at(t.data_ptr(), t.numel() * t.element_size()))
            for t in reads if t.dtype == torch.int32
        ]  # fmt: skip
        self._into.append(
            Recorded(self.variant, Launch(bytes(params), grid, (self.variant.threads, 1, 1), memory))
        )


@contextmanager
def _recording(module: ModuleType, into: list[Recorded]) -> Iterator[None]:
    """Within it, what ``module`` loads records its launches."""
    real = module.load
    module.load = lambda variant, device: _Recorder(variant, into)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.load = real  # type: ignore[attr-defined]


def record(module: ModuleType, run: Callable[[], object]) -> list[Recorded]:
    """The launches that ``run`` makes through a module of cuda_volta; the module's results stay unwritten."""
    found: list[Recorded] = []
    with _recording(module, found):
        run()
    return found
