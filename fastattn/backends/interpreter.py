"""Triton's interpreter, for the backends that FASTATTN_EMULATE names: it runs kernels on CPU tensors.

Triton decides at its import whether ``@triton.jit`` compiles or interprets, for the whole process. Three
faults of its interpreter (3.6) are repaired here, so that what it computes is what a GPU computes:

- types that NumPy lacks (bfloat16, float8) are truncated where hardware rounds to nearest even, and
  conversions of bfloat16 from and to anything but float32 take its bits for an integer;
- ``tl.dot`` of bfloat16 multiplies the bits as integers;
- bounds of loops are made by ``int`` of an array of one element, which NumPy 2.4 refuses.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import torch

from ..settings import settings


def reasons_against_emulating(name: str) -> list[str]:
    """Switches Triton to its interpreter if FASTATTN_EMULATE names the backend; why that failed, if it did.

    Call it before anything that imports Triton.
    """
    if name not in settings.emulate:
        return []
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    if not interpreting():
        why = "Triton was imported before, and compiles: set TRITON_INTERPRET=1 before Python starts"
        return [f"FASTATTN_EMULATE names {name}, but {why}"]
    return []


def interpreting() -> bool:
    """Whether Triton kernels of this process are interpreted; imports Triton, and repairs its interpreter."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.max, InterpretedFunction):
        return False
    _repair()
    return True


@cache
def _repair() -> None:
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor  # noqa: SLF001
    cast_impl, create_dot = builder.cast_impl, builder.create_dot

    def cast(self: Any, src: Any, dst_type: Any, rounding_mode: Any = None) -> Any:
        source, target = str(src.dtype.scalar), str(dst_type.scalar)
        if not {source, target} & _NOT_IN_NUMPY.keys():
            return cast_impl(self, src, dst_type)
        return interpreter.TensorHandle(_convert(src.data, source, target), dst_type.scalar)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        import triton.language as tl

        wide = [cast(self, t, tl.float32) if str(t.dtype.scalar) in _NOT_IN_NUMPY else t for t in (a, b)]
        return create_dot(self, *wide, *rest)

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        where = scope[0].set_attr if scope else setattr
        where(tensor, "__index__", lambda self: self.handle.data.item())

    builder.cast_impl = builder.create_fp_to_fp = cast
    builder.create_dot = dot
    interpreter._patch_lang_tensor = patch_tensor  # noqa: SLF001


#: Triton's types that the interpreter keeps as bits, and torch's that can compute with them.
_NOT_IN_NUMPY = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}


def _convert(data: Any, source: str, target: str) -> Any:
    """An array of Triton's type ``source`` as one of ``target``, rounded as hardware does."""
    values = torch.from_numpy(data)
    if source in _NOT_IN_NUMPY:
        values = values.view(_NOT_IN_NUMPY[source]).float()
    if target not in _NOT_IN_NUMPY:
        numpy_name = {"int1": "bool"}.get(target, target.replace("fp", "float"))
        return values.numpy().astype(numpy_name)
    dtype = _NOT_IN_NUMPY[target]
    if dtype.itemsize == 1:  # cvt.rn.satfinite
        most = torch.finfo(dtype).max
        values = values.float().clamp(-most, most)
    bits = values.to(dtype).view(torch.uint8 if dtype.itemsize == 1 else torch.int16).numpy()
    return bits.view(f"uint{8 * dtype.itemsize}")
