"""A kernel's vendor-lowered linalg, compiled for this CPU and called: what the front end made of it, run.

It shows that triton-ascend understood the kernel: addresses, masks, loops, types. It says nothing of what
bishengir-compile does after that, which nothing but an NPU runs.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from .instances import Instance, bind, instance
from .lower import lower

_PIPELINE = (
    "convert-elementwise-to-linalg linalg-fuse-elementwise-ops empty-tensor-to-alloc-tensor "
    "one-shot-bufferize=allow-return-allocs-from-loops=true convert-linalg-to-loops "
    "convert-bufferization-to-memref expand-strided-metadata lower-affine convert-scf-to-cf "
    "convert-math-to-llvm convert-vector-to-llvm arith-expand convert-arith-to-llvm memref-expand "
    "finalize-memref-to-llvm convert-func-to-llvm convert-cf-to-llvm convert-index-to-llvm lower-affine "
    "convert-arith-to-llvm reconcile-unrealized-casts"
)
# What the lowered code calls: copies between views (unranked memrefs), and the rounding to bfloat16, to
# nearest even, that libgcc has only from version 13 on. Its result is the low half of an SSE register.
_RUNTIME = r"""
#include <stdint.h>
#include <string.h>
typedef struct { int64_t rank; void *descriptor; } memref;
static void copy(char *src, int64_t *s, char *dst, int64_t *d, int64_t rank, int64_t *sizes, int64_t item) {
    if (rank == 0) { memcpy(dst, src, item); return; }
    for (int64_t i = 0; i < sizes[0]; ++i)
        copy(src + i * s[0] * item, s + 1, dst + i * d[0] * item, d + 1, rank - 1, sizes + 1, item);
}
void memrefCopy(int64_t item, memref *src, memref *dst) {
    int64_t *s = src->descriptor, *d = dst->descriptor, rank = src->rank; copy((char *)s[1] + s[2] * item, s
    + 3 + rank, (char *)d[1] + d[2] * item, d + 3 + rank, rank, s + 3, item);
}
float __truncsfbf2(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    memcpy(&value, &bits, 4);
    return value;
}
"""
_ENTRY = re.compile(r"func\.func @(\w+)\((.*?)\) attributes", re.DOTALL)


class Lowered:
    """A kernel that launches as ``kernel[grid](...)`` does, on CPU tensors, from its lowered linalg."""

    def __init__(self, kernel: str, chip: str = "Ascend910B3") -> None:
        self.kernel, self.chip = kernel, chip

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = bind(self.kernel, args, kwargs)
            needed = instance(self.kernel, arguments)
            run = _built(needed, self.chip)
            run([arguments[name] for name, _ in needed.signature], grid[0])

        return launch


@cache
def _built(needed: Instance, chip: str) -> Callable[[Sequence[Any], int], None]:
    return build(lower(needed.kernel, dict(needed.signature), dict(needed.constants), chip))


def build(linalg: str) -> Callable[[Sequence[Any], int], None]:
    """``run(arguments, programs)`` of a kernel: tensors and numbers in the order of its parameters."""
    import ascendnpuir
    from triton._C.libtriton import ir, llvm

    entry = _ENTRY.search(linalg)
    assert entry is not None, "the module has no kernel"
    opt = Path(ascendnpuir.__file__).parent / "bin" / "bishengir-opt"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, lowered = folder / "kernel.mlir", folder / "kernel.llvm.mlir"
        source.write_text(linalg)
        passes = [f"--{step}" for step in _PIPELINE.split()]
        _checked([str(opt), str(source), *passes, "-o", str(lowered)])
        context = ir.context()
        ir.load_dialects(context)
        llvm.init_targets()
        module = llvm.to_module(ir.parse_mlir_module(str(lowered), context), llvm.context())
        assembly = llvm.translate_to_asm(
            str(module), "x86_64-unknown-linux-gnu", "generic", "", [], False, False
        )
        (folder / "kernel.s").write_text(assembly)
        (folder / "runtime.c").write_text(_RUNTIME)
        library = folder / "kernel.so"
        _checked(
            [
                "gcc",
                "-O2",
                "-shared",
                "-fPIC",
                str(folder / "kernel.s"),
                str(folder / "runtime.c"),
                "-lm",
                "-o",
                str(library),
            ]
        )
        function = getattr(ctypes.CDLL(str(library)), entry[1])
    function.restype = None

    def run(arguments: Sequence[Any], programs: int) -> None:
        """Programs run one after another; ``arguments`` are tensors, ints and floats."""
        # A memref is (allocated, aligned, offset, size, stride). The first two are the vendor's own: locks
        # between blocks, and a workspace, neither of which linalg uses.
        fixed = [*_memref(None), *_memref(None)]
        for value in arguments:
            fixed += _memref(value) if isinstance(value, Tensor) else [_number(value)]
        for program in range(programs):
            grid = (programs, 1, 1, program, 0, 0)
            function(*fixed, *(ctypes.c_int32(n) for n in grid))

    return run


def _memref(tensor: Tensor | None) -> list[Any]:
    pointer = ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())
    size = 0 if tensor is None else tensor.untyped_storage().nbytes() // tensor.element_size()
    return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(size), ctypes.c_int64(1)]


def _number(value: float) -> Any:
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int32(value)


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stderr[-3000:]}")
