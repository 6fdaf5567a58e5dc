"""Compares a kernel's struct of parameters with the ctypes structure that mirrors it, field by field."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

from cuda_volta.emulator.build import BuildError, accepts
from cuda_volta.variant import Variant

_compared: set[tuple[str, str, type[ctypes.Structure]]] = set()


def compare_params(variant: Variant, mirror: type[ctypes.Structure]) -> None:
    """Raises ValueError, naming the fields, unless names, sizes and offsets agree.

    The compiler decides, once for each kernel and ``mirror``: macros do not change a kernel's parameters.
    """
    key = (variant.source, variant.entry, mirror)
    if key in _compared:
        return
    checks = [f'static_assert(sizeof(VoltaParams) == {ctypes.sizeof(mirror)}, "field: all of it");']
    for name, offset, size in _fields(mirror):
        same = f"offsetof(VoltaParams, {name}) == {offset} && sizeof(VoltaParams{{}}.{name}) == {size}"
        checks.append(f'static_assert({same}, "field: {name}");')
    try:
        accepts(variant, "\n".join(checks))
    except BuildError as error:
        lines = str(error).splitlines()
        found = re.findall(r"field: ([\w. ]+)|has no member named '(\w+)'", "\n".join(lines))
        names = sorted({one or other for one, other in found})
        what = ", ".join(names) or str(error)
        raise ValueError(f"params: {mirror.__name__} is not the struct of {variant.entry}: {what}") from None
    _compared.add(key)


def _fields(
    mirror: type[ctypes.Structure], prefix: str = "", base: int = 0
) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of every field that is not a structure itself, those within by dotted names."""
    for name, kind, *_ in mirror._fields_:
        offset = base + getattr(mirror, name).offset
        if issubclass(kind, ctypes.Structure):
            yield from _fields(kind, f"{prefix}{name}.", offset)
        else:
            yield prefix + name, offset, ctypes.sizeof(kind)
