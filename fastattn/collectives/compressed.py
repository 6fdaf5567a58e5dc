"""The policy `compressed` (arXiv 2411.09510): partial results travel as blocks of few bits with a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..quant.codec import Codec
from ..quant.packed import FLOATS
from ..spec import Point, TPGroup
from .exchange import against_messages
from .pairwise import Pairwise
from .policy import unsupported
from .wire import Wire


@dataclass(frozen=True, kw_only=True)
class Compressed(Pairwise):
    """``codec`` says how; the paper's all-gather of codes with a local sum is the scheme ``one_step``.

    Every rank decodes the same messages, its own among them, and adds them in the same order. NaN and
    infinities come out as NaN, in their whole block.
    """

    codec: Codec = field(default_factory=Codec)

    name: ClassVar[str] = "compressed"
    exact: ClassVar[bool] = False

    @property
    def wire(self) -> Wire:
        return CodecWire(self.codec)

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        """[] if the policy can run at point ``p``."""
        reasons = unsupported(dtype, FLOATS, g) + against_messages(g)
        try:
            self.codec.message_bytes(rows, hidden)
        except ValueError as error:
            reasons.append(str(error))
        return reasons


class CodecWire(NamedTuple):
    """A `wire.Wire` of encoded messages, made and read on one thread: the model has the cores."""

    codec: Codec

    def encode(self, x: Tensor) -> Tensor:
        return self.codec.encode(x, threads=1)

    def inbox(self, into: Tensor) -> Tensor:
        return torch.empty(self.message_bytes(*into.shape), dtype=torch.uint8)

    def read(self, message: Tensor, into: Tensor) -> None:
        rows, hidden = into.shape
        self.codec.decode_sum([message], rows, hidden, into.dtype, threads=1, out=into)

    def add(self, messages: Sequence[Tensor], rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        return self.codec.decode_sum(messages, rows, hidden, dtype, threads=1)

    def message_bytes(self, rows: int, hidden: int) -> int:
        return self.codec.message_bytes(rows, hidden)
