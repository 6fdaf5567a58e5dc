"""Which instantiations of which kernels a call launches: types of its arguments, values of its constants.

They are taken from the public functions themselves, called on tensors of a few elements, so that what is
planned is what is launched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import cpu_executor, jit

_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Instance(NamedTuple):
    """A kernel as the compiler sees it."""

    kernel: str  # "module:function"
    signature: tuple[tuple[str, str], ...]  # (parameter, type): "*fp16", "i32", ...
    constants: tuple[tuple[str, Any], ...]

    def planning(self, *chips: str) -> dict[str, Any]:
        """The arguments of `worker.plan_kernel` for it."""
        constants = dict(self.constants)
        return {
            "kernel": self.kernel,
            "signature": dict(self.signature),
            "constants": constants,
            "chips": chips,
        }


def instance(kernel: str, arguments: Mapping[str, Any]) -> Instance:
    """The instantiation of ``kernel`` that a launch with these arguments, by name, needs."""
    parameters = inspect.signature(jit(kernel).fn).parameters
    signature, constants = [], []
    for name, value in arguments.items():
        if value is None or "constexpr" in str(parameters[name].annotation):
            constants.append((name, value))
        elif isinstance(value, Tensor):
            signature.append((name, f"*{_TYPES[value.dtype]}"))
        else:
            signature.append((name, "fp32" if isinstance(value, float) else "i32"))
    return Instance(kernel, tuple(signature), tuple(constants))


def bind(kernel: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a launch by name, in the order of the kernel's parameters."""
    return dict(inspect.signature(jit(kernel).fn).bind(*args, **kwargs).arguments)


class _Recorder:
    def __init__(self, kernel: str, seen: list[Instance]) -> None:
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.seen.append(
            instance(self.kernel, bind(self.kernel, args, kwargs))
        )


@contextmanager
def recording() -> Iterator[list[Instance]]:
    """Kernels on CPU tensors are noted in the list and not run."""
    seen: list[Instance] = []
    with cpu_executor(lambda kernel: _Recorder(kernel, seen)):
        yield seen
