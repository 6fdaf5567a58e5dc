"""Names and block sizes of ggml's types; for those that are not read natively, the `gguf` library knows them.

That library imports a YAML parser and more, so a model whose types are all listed here does without.
"""

from __future__ import annotations

from typing import NamedTuple

from ..spec import CheckpointError


class GgmlType(NamedTuple):
    """A type's name, and how many values lie in a block of how many bytes."""

    name: str
    values: int
    nbytes: int


NATIVE = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    30: GgmlType("BF16", 1, 2),
}


def ggml_type(number: int, path: object, tensor: str) -> GgmlType:
    """The type that a file's tensor table means by ``number``; `CheckpointError` where nobody knows it."""
    if number in NATIVE:
        return NATIVE[number]
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(number)
        return GgmlType(known.name, *GGML_QUANT_SIZES[known])
    except (ValueError, KeyError):
        raise CheckpointError(path, f"has unknown ggml type {number}", tensor) from None
