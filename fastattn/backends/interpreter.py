"""Triton's interpreter, for the backends that FASTATTN_EMULATE names: it runs kernels on CPU tensors.

Triton decides at its import whether ``@triton.jit`` compiles or interprets, for the whole process.
"""

from __future__ import annotations

import os
import sys

from ..settings import settings


def reasons_against_emulating(name: str) -> list[str]:
    """Switches Triton to its interpreter if FASTATTN_EMULATE names the backend; why that failed, if it did.

    Call it before anything that imports Triton.
    """
    if name not in settings.emulate:
        return []
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    return [] if interpreting() else [
        f"FASTATTN_EMULATE names {name}, but Triton was imported before and compiles: set TRITON_INTERPRET=1 "
        "before Python starts, or call fastattn before anything else imports Triton"
    ]  # fmt: skip


def interpreting() -> bool:
    """Whether Triton kernels defined in this process are interpreted; imports Triton."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.max, InterpretedFunction)
