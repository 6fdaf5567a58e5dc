"""Where a kernel runs: compiled on an NPU, or on CPU tensors by Triton's interpreter or another executor.

The interpreter of Triton 3.6 has faults; a process that uses it repairs them first, as
`fastattn.backends.interpreter` does when FASTATTN_EMULATE names ascend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .router import Chip

#: From "module:function" to what ``[grid](*arguments)`` launches.
Executor = Callable[[str], Any]


def no_compiler(chip: Chip) -> str:
    """Why kernels do not run on an NPU of this kind here; "" where they do."""
    if not chip.compiles_triton:
        return f"no compiler for {chip.family}"
    return "" if has_triton_ascend() else "triton-ascend is not installed"


@cache
def has_triton_ascend() -> bool:
    """Whether the `triton` of this environment is triton-ascend, which installs under that name."""
    spec = find_spec("triton")
    # Looked up as a file: to import Triton here would settle whether it interprets.
    folders = map(Path, (spec and spec.submodule_search_locations) or ())
    return any((folder / "backends" / "ascend").is_dir() for folder in folders)


def interpreted(name: str) -> Any:
    """The kernel in Triton's interpreter. Raises RuntimeError if Triton compiles in this process."""
    function = jit(name)
    if type(function).__name__ != "InterpretedFunction":
        raise RuntimeError(
            f"{name} on CPU tensors is interpreted by Triton: set TRITON_INTERPRET=1 before it is imported"
        )
    return function


def jit(name: str) -> Any:
    """The ``@triton.jit`` function ``"module:function"``."""
    module, function = name.split(":")
    return getattr(import_module(module), function)


_on_cpu: Executor = interpreted


def kernel(name: str, device: torch.device) -> Any:
    """The kernel ``name`` ("prefill:prefill_kernel", in `kernels`) for tensors on ``device``."""
    path = f"ascend_ops.kernels.{name}"
    return _on_cpu(path) if device.type == "cpu" else _On(device, jit(path))


@dataclass(frozen=True)
class _On:
    """A kernel on the tensors' device, which need not be the thread's current one: Triton takes that."""

    device: torch.device
    function: Any

    def __getitem__(self, grid: Any) -> Any:
        launch = self.function[grid]

        def run(*args: Any, **kwargs: Any) -> Any:
            with getattr(torch, self.device.type).device(self.device):
                return launch(*args, **kwargs)

        return run


@contextmanager
def cpu_executor(executor: Executor) -> Iterator[None]:
    """Runs kernels on CPU tensors by ``executor`` meanwhile, instead of the interpreter."""
    global _on_cpu  # noqa: PLW0603
    before, _on_cpu = _on_cpu, executor
    try:
        yield
    finally:
        _on_cpu = before
