"""Triton's interpreter, for the backends that FASTATTN_EMULATE names: it runs kernels on CPU tensors.

Triton decides at its import whether ``@triton.jit`` compiles or interprets, for the whole process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

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
        return [
            f"FASTATTN_EMULATE names {name}, but Triton was imported before and compiles: set TRITON_INTERPRET=1 "
            "before Python starts, or call fastattn before anything else imports Triton"
        ]
    _let_loops_run()
    return []


def interpreting() -> bool:
    """Whether Triton kernels defined in this process are interpreted; imports Triton."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.max, InterpretedFunction)


def _let_loops_run() -> None:
    """NumPy 2.4 refuses ``int`` of an array of one element, by which Triton's interpreter (3.6) makes its
    scalars the bounds of a loop: gives it ``item``, which every NumPy has."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor  # noqa: SLF001
    if getattr(patch, "fixed", False):
        return

    def patch_and_fix(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        where = scope[0].set_attr if scope else setattr
        where(tensor, "__index__", lambda self: self.handle.data.item())

    patch_and_fix.fixed = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_fix  # noqa: SLF001
