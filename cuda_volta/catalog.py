"""Every variant of every op: what is built, shipped and tested."""

from __future__ import annotations

from importlib import import_module

from .binary import SHARED_BYTES
from .variant import Variant

#: Modules of this package that launch kernels; each lists its own as ``VARIANTS``.
MODULES = ("prefill", "decode", "append", "rotary", "norm", "gate", "linear", "permute", "weights")


def variants(arch: str = "sm_70") -> tuple[Variant, ...]:
    """All that a block of ``arch`` has the shared memory for (Volta: all), in the order of `MODULES`.

    Their names are unique, since they name files.
    """
    found = tuple(v for name in MODULES for v in import_module(f"{__package__}.{name}").VARIANTS)
    names = [v.name for v in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise RuntimeError(f"several variants are called {', '.join(twice)}")
    return tuple(v for v in found if v.shared_bytes <= SHARED_BYTES[arch])
