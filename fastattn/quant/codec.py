"""The wire codec of compressed communication (arXiv 2411.09510, and beyond it).

A rank quantizes its partial result into one message of bytes; every rank decodes the messages of all, in
the same order, and sums them. Beyond the paper: scales finer than powers of two, scales of the least squared
error, a Hadamard rotation, and outlier channels that are kept in 16 bits.

The same message decodes to the same bits on every device, instruction set and number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..spec import DecodeSumArgs, EncodeArgs
from . import message, mx
from .packed import FLOATS


@dataclass(frozen=True)
class Codec:
    """How a (rows, hidden) tensor becomes a message; see quant/mx.py for formats and scales.

    ``rotate``: each whole block of so many quantized channels is multiplied by the orthonormal Hadamard
    matrix before it is quantized, and the sum is rotated back once (the rotation is linear, so it commutes
    with the sum). Channels after the last whole block are not rotated. It spreads a large value over its
    block, which suits ``int4``. 0: none.

    ``outliers``: channels that are kept in bfloat16, ascending. They are taken out before anything else, and
    the other channels move together: blocks are counted in the channels that remain.

    A NaN or an infinity makes all of its block NaN after decoding, with ``rotate`` all of the rotated blocks
    that the block touches; in an outlier channel it stays what it is. Values beyond 2^120 may become
    NaN in a rotation and infinite in an outlier channel. A finite value never becomes another far from it.

    Raises ValueError naming the field that is out of range.
    """

    element: str = "e2m1"
    block: int = 32
    scale: str = "floor"
    search: bool = False
    rotate: int = 0
    outliers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            # By type, not isinstance: True is no block length.
            if type(value) is not type(field.default):
                raise ValueError(f"{field.name}: {value!r}, expected {type(field.default).__name__}")
        if not all(type(channel) is int for channel in self.outliers):
            raise ValueError(f"outliers: {self.outliers}, expected integers")
        mx.check_format(self.element, self.block, self.scale, self.search)
        message.check(self.rotate, self.outliers)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them; `from_json` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"outliers": list(self.outliers)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Codec:
        """A codec from its fields, absent ones at their defaults; ValueError names what is wrong."""
        if not isinstance(data, Mapping):
            raise ValueError(f"codec: {data!r}, expected an object")  # noqa: TRY004 - data from a file
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f"codec: unknown key {key!r}, expected {', '.join(known)}")
        given = dict(data)
        if isinstance(given.get("outliers"), list):
            given["outliers"] = tuple(given["outliers"])
        return cls(**given)

    def message_bytes(self, rows: int, hidden: int) -> int:
        """Exact size of one message of ``rows`` rows."""
        return self._layout(rows, hidden).nbytes

    def bits(self, hidden: int) -> float:
        """Effective bits of a value: everything in the message counted."""
        return 8 * self.message_bytes(1, hidden) / hidden

    def encode(self, x: Tensor, threads: int = 1) -> Tensor:
        """The message of ``x`` (rows, hidden), float32, bfloat16 or float16: contiguous uint8 (bytes,).

        With ``threads`` 1 no OpenMP region is entered: it may run beside a model that computes.
        """
        if x.ndim != 2:
            raise ValueError(f"x: {tuple(x.shape)}, expected (rows, hidden)")
        if x.dtype not in FLOATS:
            raise ValueError(f"x: {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        self._layout(*x.shape)
        args = EncodeArgs(
            x, self.element, self.block, self.scale, self.search, self.rotate, self.outliers, threads
        )
        result: Tensor = dispatch.run("encode", args)
        return result

    def decode_sum(
        self,
        messages: Sequence[Tensor],
        rows: int,
        hidden: int,
        dtype: torch.dtype,
        threads: int = 1,
        out: Tensor | None = None,
    ) -> Tensor:
        """The sum of messages, in the order given, (rows, hidden) of ``dtype``.

        Each is uint8 (message_bytes(rows, hidden),), contiguous. Values are summed in float32 and rounded
        once. ``out``, if given, is contiguous (rows, hidden) of ``dtype``; it is written and returned.
        """
        size = self._layout(rows, hidden).nbytes
        if not messages:
            raise ValueError("messages: none, expected at least one")
        if dtype not in FLOATS:
            raise ValueError(f"dtype: {dtype}, expected one of {', '.join(map(str, FLOATS))}")
        for i, m in enumerate(messages):
            if m.dtype != torch.uint8 or m.shape != (size,):
                raise ValueError(f"messages[{i}]: {m.dtype} {tuple(m.shape)}, expected torch.uint8 ({size},)")
        if out is not None and (out.dtype != dtype or out.shape != (rows, hidden) or not out.is_contiguous()):
            raise ValueError(
                f"out: {out.dtype} {tuple(out.shape)}, expected contiguous {dtype} {(rows, hidden)}"
            )
        args = DecodeSumArgs(
            tuple(messages), rows, hidden, dtype, self.element, self.block, self.scale, self.rotate,
            self.outliers, threads, out,
        )  # fmt: skip
        result: Tensor = dispatch.run("decode_sum", args)
        return result

    def _layout(self, rows: int, hidden: int) -> message.Layout:
        return message.Layout.of(rows, hidden, self.element, self.block, self.scale, self.outliers)
