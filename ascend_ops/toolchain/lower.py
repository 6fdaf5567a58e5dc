"""A Triton kernel to the vendor's linalg dialect, by triton-ascend's own stages: no CANN, no NPU.

Runs where ``triton`` is triton-ascend (3.2.0). Its launcher needs CANN; its front end does not.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from .plan import is_950

MIX_MODE = re.compile(r', mix_mode\s*=\s*"[^"]*"')


def lower(kernel: str, signature: Mapping[str, str], constants: Mapping[str, Any], chip: str) -> str:
    """The linalg text of ``kernel``.

    Args:
        kernel: ``"module:function"`` of a ``@triton.jit`` function.
        signature: parameter to type, e.g. ``"*fp16"``, ``"i32"``.
        constants: the other parameters, all ``constexpr``; None for an absent pointer.
        chip: the compiler's name of the chip, e.g. ``"Ascend910B3"``.
    """
    import triton.backends.ascend.compiler as vendor
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.split(":")
    target = GPUTarget("npu", chip, 0)
    backend = vendor.AscendBackend(target)
    # The wheel is built for the other chips: a build for the 950 has these settings by default.
    for_950 = {"compile_on_910_95": True, "enable_select_analysis": True}
    options = backend.parse_options(for_950 if is_950(chip) else {})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    function = getattr(importlib.import_module(module), name)
    source = ASTSource(fn=function, signature=dict(signature), constants=dict(constants))
    ttir = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = {"hash": name, "target": target, **options.__dict__}
    ttir = vendor.make_ttir(ttir, metadata, options)
    # The compiler infers from the code which cores a kernel needs, and refuses the attribute.
    return MIX_MODE.sub("", vendor.ttir_to_linalg(ttir, metadata, options, named_ops=True))
