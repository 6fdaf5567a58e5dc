"""Launches: what a host function decided, run on a device, or interpreted, or compiled for another machine.

Triton binds, specializes and looks up every argument of every launch. `run` keeps the compiled kernel under
a key that is cheaper to make, and hands it the arguments directly.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends.interpreter import interpreting


class Launch(NamedTuple):
    """One kernel with everything that it is launched with."""

    kernel: Any  # a function under @triton.jit
    programs: int  # the grid has one dimension: the others end at 65535
    args: tuple[Any, ...]  # tensors, descriptors, numbers and None, in the kernel's order
    constants: tuple[Hashable, ...]  # its tl.constexpr parameters, which follow
    num_warps: int
    num_stages: int
    fuse: bool = True  # multiplications and additions; False where each must round by itself


_compiled: dict[Hashable, Any] = {}
_INTERPRETED = interpreting()


def run(launches: list[Launch], device: torch.device) -> None:
    """Enqueues the launches on the device's current stream. Under a CUDA graph, warm up before capture."""
    if _INTERPRETED or device.index == torch.cuda.current_device():
        for launch in launches:
            _run(launch, device.index)
    else:
        with torch.cuda.device(device):
            for launch in launches:
                _run(launch, device.index)


def _run(launch: Launch, device: int | None) -> None:
    kernel, programs, args, constants, num_warps, num_stages, fuse = launch
    if not programs:
        return
    if _INTERPRETED:
        with np.errstate(all="ignore"):  # hardware does not warn either
            kernel[programs,](*args, *constants)
        return
    key = compiled_key(launch, device)
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[programs,](
            *args, *constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fuse
        )
    else:
        found[programs, 1, 1](*args, *constants)


def compiled_key(launch: Launch, device: int | None) -> Hashable:
    """What decides which machine code a launch is."""
    kernel, _, args, *options = launch
    return (kernel, device, *options, *map(specialization, args))


def specialization(arg: Any) -> Hashable:
    """What Triton compiles an argument in: at least as fine as its own rule."""
    if arg is None:
        return None
    if isinstance(arg, bool):  # of a type of its own, and an int to Python
        return bool
    if isinstance(arg, int):
        return (arg & 15 == 0, arg == 1, -(1 << 31) <= arg < 1 << 31)
    if isinstance(arg, Tensor):
        return (arg.dtype, arg.data_ptr() & 15 == 0)
    if isinstance(arg, float):
        return float
    if isinstance(arg, tuple):
        return tuple(map(specialization, arg))
    return (arg.base.dtype, *arg.block_shape)
