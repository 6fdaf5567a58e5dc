"""The native CPU kernels: a C++ extension, free of torch's ABI, chosen by instruction set at run time.

Importing this module loads the extension; ImportError says why when it cannot be. torch is imported
first: the extension uses the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import torch

from ..settings import settings

try:
    from . import _kernels
except ImportError as error:
    raise ImportError(
        f"fastattn's native CPU kernels are not usable: {error}. Build them for this Python with "
        "`pip install .` (`pip install -e .` in a checkout), which needs g++ and Python's headers; "
        f"torch {torch.__version__} is in use."
    ) from error

kernels = _kernels  # attention and the small ops, on tensors; see the src/*_bindings.cpp files
isa = _kernels.isa
available_isas = _kernels.available_isas
set_isa = _kernels.set_isa
build_info = _kernels.build_info

if settings.cpu_isa:
    try:
        set_isa(settings.cpu_isa)
    except ValueError as error:
        raise ValueError(
            f"environment variable {str(error).replace('isa=', 'FASTATTN_CPU_ISA=', 1)}"
        ) from None

__all__ = ["available_isas", "build_info", "isa", "kernels", "set_isa"]
