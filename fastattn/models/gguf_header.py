"""The header of a GGUF file, read with every count and offset checked against the file's size.

`gguf.GGUFReader` trusts the file: a flipped bit in a count makes it loop or allocate for minutes, and a sound
file of 49 000 tokens takes it seconds. This reader takes a tenth of one, and what it returns is in bounds.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..spec import CheckpointError
from .gguf_types import GgmlType, ggml_type

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MIN_FIELD = 8 + 4 + 1  # bytes: key length, value type, shortest value
_MIN_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: name length, dimensions, one size, type, offset
_MAX_DIMS = 4


class Strings:
    """An array of strings, kept as the file has it: a list of as many texts takes several times that."""

    def __init__(self, raw: bytes, ends: NDArray[np.int64]) -> None:
        """``ends``: where in ``raw`` each text ends; in front of it are eight bytes with its length."""
        self._raw, self._ends = raw, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in self._ends.tolist():
            yield self._raw[begin + 8 : end].decode()
            begin = end

    def __repr__(self) -> str:
        return f"{len(self)} strings"


class GgufTensor(NamedTuple):
    """One row of the tensor table."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]  # rows first, as numpy has it; the file lists sizes in the opposite order
    offset: int  # bytes from the start of the file
    nbytes: int


class GgufHeader(NamedTuple):
    """Everything in front of the weights."""

    fields: dict[str, Any]  # key: int, float, bool, str, Strings or numpy array
    tensors: dict[str, GgufTensor]
    size: int  # of the file, bytes


def read_header(path: Path) -> GgufHeader:
    """Reads the header of ``path``; any contradiction in it is a `CheckpointError`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise CheckpointError(path, f"has {size} bytes, too short for a GGUF header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, size).header()
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error


class _Reader:
    """A cursor over the mapped file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.pos = path, data, size, 0

    def header(self) -> GgufHeader:
        if self._bytes(4, "magic") != _MAGIC:
            self._fail("does not start with GGUF")
        version = self._scalar("<I", "version")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0
            self._fail("is big-endian" if swapped else f"has GGUF version {version}, supported are 2 and 3")
        tensor_count = self._count("tensor count", _MIN_TENSOR)
        field_count = self._count("metadata count", _MIN_FIELD)
        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string("metadata key")
            if key in fields:
                self._fail("appears twice", key)
            fields[key] = self._value(key)
        alignment = fields.get("general.alignment", 32)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
            self._fail("is not a positive number", "general.alignment")
        if alignment & (alignment - 1):
            self._fail(f"is {alignment}, expected a power of two", "general.alignment")
        rows = [self._tensor_row() for _ in range(tensor_count)]
        start = -(-self.pos // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for row in rows:
            if row.name in tensors:
                self._fail("appears twice", row.name)
            if row.offset % alignment:
                self._fail(f"starts at {row.offset}, not a multiple of {alignment}", row.name)
            if start + row.offset + row.nbytes > self.size:
                end = start + row.offset + row.nbytes
                self._fail(f"ends at byte {end}, the file has {self.size}: truncated?", row.name)
            tensors[row.name] = row._replace(offset=start + row.offset)
        return GgufHeader(fields, tensors, self.size)

    def _tensor_row(self) -> GgufTensor:
        name = self._string("tensor name")
        dims = self._scalar("<I", name)
        if not 1 <= dims <= _MAX_DIMS:
            self._fail(f"has {dims} dimensions, expected 1 to {_MAX_DIMS}", name)
        sizes = [self._scalar("<Q", name) for _ in range(dims)]
        kind, offset = self._scalar("<I", name), self._scalar("<Q", name)
        if 0 in sizes:
            self._fail("has a dimension of size 0", name)
        found = ggml_type(kind, self.path, name)
        if sizes[0] % found.values:
            reason = f"has rows of {sizes[0]} values, {found.name} needs a multiple of {found.values}"
            self._fail(reason, name)
        nbytes = sizes[0] // found.values * found.nbytes
        for size in sizes[1:]:
            nbytes *= size  # Python's integers do not wrap round
        return GgufTensor(name, found, tuple(reversed(sizes)), offset, nbytes)

    def _value(self, key: str) -> Any:
        kind = self._scalar("<I", key)
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind], key)
        if kind != _ARRAY:
            self._fail(f"has unknown value type {kind}", key)
        item = self._scalar("<I", key)
        if item == _STRING:
            return self._strings(key)
        if item not in _SCALARS:
            self._fail(f"is an array of unknown type {item}", key)
        dtype = np.dtype(_SCALARS[item]) if item != _BOOL else np.dtype(np.uint8)
        count = self._count(key, dtype.itemsize)
        array = np.frombuffer(self._bytes(count * dtype.itemsize, key), dtype)
        return array != 0 if item == _BOOL else array

    def _count(self, what: str, item_bytes: int) -> int:
        """A 64-bit count of items that must fit into the rest of the file."""
        count = self._scalar("<Q", what)
        if count * item_bytes > self.size - self.pos:
            self._fail(f"counts {count} items, more than the rest of the file can hold: truncated?", what)
        return int(count)

    def _strings(self, key: str) -> Strings:
        count, begin = self._count(key, 8), self.pos
        ends = np.empty(count, np.int64)
        for i in range(count):
            self._string(key)
            ends[i] = self.pos - begin
        return Strings(self.data[begin : self.pos], ends)

    def _string(self, what: str) -> str:
        raw = self._bytes(self._count(what, 1), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            # llama.cpp takes keys and tokens as bytes; outside of UTF-8 they could not be shown or encoded
            self._fail(f"holds text that is not UTF-8: {raw[:40]!r}", what)

    def _scalar(self, code: str, what: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code), what))[0]

    def _bytes(self, count: int, what: str) -> bytes:
        end = self.pos + count
        if end > self.size:
            self._fail("the header ends in the middle of it: truncated?", what)
        found = self.data[self.pos : end]
        self.pos = end
        return found

    def _fail(self, reason: str, what: str = "") -> NoReturn:
        raise CheckpointError(self.path, reason, what[:200])
