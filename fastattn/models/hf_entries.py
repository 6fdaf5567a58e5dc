"""Where the tensors of a Hugging Face directory lie, those of one quantized matrix together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..quant.grouped import Format
from ..spec import CheckpointError

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "I64": torch.int64,
}  # fmt: skip
_MARKS = (".qweight", ".weight_packed")  # of quantized matrices


class Entry(NamedTuple):
    """One tensor of a file."""

    file: Path
    stored: str  # name within the file
    dtype: str  # safetensors' name of it
    shape: tuple[int, ...]


class PackedEntry(NamedTuple):
    """One quantized matrix."""

    format: Format
    shape: tuple[int, ...]  # (out, in)
    parts: Mapping[str, Entry]  # by the format's names of its tensors

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file


def gather(
    stored: dict[str, Entry], wanted: Mapping[str, tuple[int, ...]], kind: Format | None
) -> dict[str, Entry | PackedEntry]:
    """``stored`` with the tensors of each quantized matrix of ``wanted`` as one entry "NAME.weight".

    Layers without such tensors stay as they are: checkpoints may be quantized in part. Raises
    CheckpointError for a matrix stored twice or in part, and for shapes and types that do not fit.
    """
    if kind is None:
        for name, entry in stored.items():
            if name.endswith(_MARKS):
                raise CheckpointError(entry.file, "is quantized, but no config says how", name)
        return dict(stored)
    left: dict[str, Entry | PackedEntry] = dict(stored)
    for name, shape in wanted.items():
        prefix = name.removesuffix("weight")
        parts = {n: stored[prefix + n] for n in kind.tensors if prefix + n in stored}
        if parts and len(shape) == 2:
            left[name] = _packed(name, (shape[0], shape[1]), parts, kind)
            if name in stored:
                reason = f"is there beside {kind.name}'s {', '.join(parts)}"
                raise CheckpointError(stored[name].file, reason, name)
            for n in parts:
                del left[prefix + n]
    for name, found in left.items():
        if name.endswith(_MARKS):
            raise CheckpointError(found.file, "belongs to no matrix of this model", name)
    return left


def _packed(name: str, shape: tuple[int, int], parts: Mapping[str, Entry], kind: Format) -> PackedEntry:
    file, prefix = next(iter(parts.values())).file, name.removesuffix("weight")
    try:
        shapes = kind.shapes(*shape)
    except ValueError as error:
        raise CheckpointError(file, str(error), name) from error
    for n in kind.tensors:
        if n not in parts and n not in kind.optional:
            raise CheckpointError(file, f"is missing, {', '.join(parts)} are there", prefix + n)
    for n, entry in parts.items():
        _check(entry, prefix + n, shapes[n], kind.dtypes(n), f"{shape[0]} x {shape[1]} of {kind}")
    return PackedEntry(kind, shape, parts)


def _check(
    entry: Entry, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], what: str
) -> None:
    if entry.shape != shape:
        raise CheckpointError(entry.file, f"has shape {entry.shape}, expected {shape} for {what}", name)
    allowed = [n for n, dtype in DTYPES.items() if dtype in dtypes]
    if entry.dtype not in allowed:
        raise CheckpointError(entry.file, f"has dtype {entry.dtype}, expected {' or '.join(allowed)}", name)
