"""Compiles launches for a GPU that is not here: what registers and shared memory they take, what spills.

Triton's compiler and its ptxas need no device. A launch made of tensors on the device ``meta`` compiles to
what the same call on a GPU would.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from .device import Chip
from .launch import Launch, specialization


class Report(NamedTuple):
    """One compiled kernel."""

    registers: int  # of a thread
    spills: int  # bytes of a thread's local memory
    shared_bytes: int  # of a program
    scratch_bytes: int  # of global memory that a launch would have to allocate
    ptx: str


def compile_for(launch: Launch, chip: Chip) -> Report:
    """Compiles one launch. Raises what Triton's compiler raises."""
    source = _source(launch)
    options = {
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": launch.fuse
    }  # fmt: skip
    made = triton.compile(source, target=GPUTarget("cuda", chip.capability, 32), options=options)
    registers, spills = _usage(made.asm["cubin"], made.metadata.name)
    return Report(registers, spills, made.metadata.shared, made.metadata.global_scratch_size, made.asm["ptx"])


def _source(launch: Launch) -> ASTSource:
    names = launch.kernel.arg_names
    values: dict[str, Any] = dict(zip(names, (*launch.args, *launch.constants), strict=True))
    fixed = set(names[len(launch.args) :])
    unspecialized = {p.name for p in launch.kernel.params if p.do_not_specialize}
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, (name, value) in enumerate(values.items()):
        one = isinstance(value, int) and value == 1 and name not in unspecialized
        if name in fixed or value is None or one:
            signature[name], constants[(index,)] = "constexpr", value
            continue
        if isinstance(value, tuple):
            signature[name] = tuple(map(mangle_type, value))
            places: dict[tuple[int, ...], Any] = {(index, i): v for i, v in enumerate(value)}
        else:
            signature[name], places = mangle_type(value), {(index,): value}
        if name not in unspecialized:
            attributes |= {at: [["tt.divisibility", 16]] for at, v in places.items() if _divisible(v)}
    return ASTSource(launch.kernel, signature, constants, attributes)


def _divisible(value: Any) -> bool:
    """Whether the compiler may rely on 16 dividing a number or an address."""
    found = specialization(value)
    return isinstance(found, tuple) and bool(found[1] if isinstance(value, Tensor) else found[0] is True)


@cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _usage(cubin: bytes, name: str) -> tuple[int, int]:
    """Registers and local bytes of a thread. A cubin says both, ptxas would only print them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(rf"{name}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])
