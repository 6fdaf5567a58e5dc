"""Triton's interpreter, which runs the kernels on CPU tensors, with three of its faults mended.

Triton 3.6 stores bfloat16 as integers of 16 bits: it multiplies those integers in ``tl.dot``, and drops the low
bits where a device rounds to nearest. And its loop bounds are arrays of one element, which NumPy 2.4 no
longer takes for numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt


@cache
def prepare() -> None:
    """Readies this process for kernels on CPU tensors; imports Triton.

    Raises RuntimeError unless TRITON_INTERPRET=1 was set when Triton was first imported.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.max, interpreter.InterpretedFunction):
        raise RuntimeError(
            "Ascend kernels on CPU tensors run in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported"
        )
    patch = interpreter._patch_lang_tensor  # noqa: SLF001
    convert = interpreter._convert_float  # noqa: SLF001
    dot = interpreter.InterpreterBuilder.create_dot

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target, rounding) == (tl.float32, tl.bfloat16, None):
            return to_bfloat16(data)
        return convert(data, source, target, rounding)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(from_bfloat16(t.data), tl.float32) for t in (a, b))
        return dot(self, a, b, d, *options)

    interpreter._patch_lang_tensor = patch_lang_tensor  # noqa: SLF001
    interpreter._convert_float = convert_float  # noqa: SLF001
    interpreter.InterpreterBuilder.create_dot = create_dot


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The numbers that 16-bit patterns stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The 16-bit patterns nearest to the values, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
