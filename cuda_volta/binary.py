"""A variant compiled: its machine code, its PTX, and the resources that it takes."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import NamedTuple

from .cache import Cache, digest
from .nvrtc import Nvrtc, nvrtc
from .variant import KERNELS, Variant

#: Shared memory that a block may have, by architecture. Turing (sm_75) has Volta's tensor-core instruction,
#: HMMA.884, too, but less of this.
SHARED_BYTES = {"sm_70": 96 << 10, "sm_72": 96 << 10, "sm_75": 64 << 10}
ARCHITECTURES = tuple(SHARED_BYTES)
#: Whose PTX newer GPUs run.
PTX_OF = "sm_70"
_FLAGS = ("-std=c++17", "-default-device", "--ptxas-options=-v")
#: Of CUDA 12.0, so that any driver of the 12 series compiles the PTX.
_PTX_ISA = "8.0"
_CACHE = Cache("volta-cubins")


class Binary(NamedTuple):
    """One variant for one architecture."""

    cubin: bytes
    ptx: str  # of the virtual architecture of the same number; "" where nobody would run it (`PTX_OF`)
    registers: int  # of a thread
    stack_bytes: int  # local memory of a thread, spills included
    spill_bytes: int  # in all spill stores and loads of the code
    shared_bytes: int  # of a block, static and dynamic

    def to_bytes(self) -> bytes:
        head = json.dumps([len(self.cubin), *self[2:]]).encode() + b"\n"
        return head + self.cubin + self.ptx.encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Binary:
        head, _, rest = data.partition(b"\n")
        size, *numbers = json.loads(head)
        return cls(rest[:size], rest[size:].decode(), *numbers)


def source_key(variant: Variant) -> str:
    """Changes with everything about a variant that its machine code depends on, but for the compiler."""
    defines = json.dumps([variant.entry, variant.defines, variant.shared_bytes, _FLAGS, _PTX_ISA])
    return digest(variant.source, _text(variant.source), _headers(), defines)


def binary(variant: Variant, arch: str) -> Binary:
    """As `compile_binary`, with a cache on disk: at most once on this machine."""
    compiler = nvrtc()
    key = digest(source_key(variant), arch, repr(compiler.version))
    return Binary.from_bytes(_CACHE.fetch(key, lambda: compile_binary(variant, arch, compiler).to_bytes()))


def compile_binary(variant: Variant, arch: str, compiler: Nvrtc) -> Binary:
    """Compiles the variant. Raises CompileError with the compiler's messages."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: {arch!r}, expected one of {', '.join(ARCHITECTURES)}")
    defines = [f"-D{name}={value}" for name, value in variant.defines]
    options = [f"--gpu-architecture={arch}", *_FLAGS, f"--include-path={KERNELS}", *defines]
    cubin, ptx, log = compiler.compile(_text(variant.source), variant.source, options)
    return Binary(cubin, _for_older_drivers(ptx) if arch == PTX_OF else "", *_resources(log, variant))


def _for_older_drivers(ptx: str) -> str:
    """The same code in `_PTX_ISA`: NVRTC names its own ISA, of which it uses no more than a hint to ptxas."""
    ptx = re.sub(r'^\s*\.pragma "used_bytes_mask[^"]*";\n', "", ptx, flags=re.MULTILINE)
    return re.sub(r"^\.version .*$", f".version {_PTX_ISA}", ptx, count=1, flags=re.MULTILINE)


def _resources(log: str, variant: Variant) -> tuple[int, int, int, int]:
    """(registers, stack, spill and shared bytes) of the variant's kernel, as ptxas -v reports them."""
    report = log.partition(f"Compiling entry function '{variant.entry}'")[2]
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used = re.search(r"Used (\d+) registers(.*)", report)
    if stack is None or used is None:
        raise RuntimeError(f"{variant.name}: ptxas did not report the resources of {variant.entry}:\n{log}")
    static = re.search(r"(\d+) bytes smem", used[2])
    shared = variant.shared_bytes + (int(static[1]) if static else 0)
    return int(used[1]), int(stack[1]), int(stack[2]) + int(stack[3]), shared


@cache
def _text(source: str) -> str:
    return (KERNELS / source).read_text()


@cache
def _headers() -> str:
    return digest(*(part for file in sorted(KERNELS.glob("*.cuh")) for part in (file.name, file.read_text())))
