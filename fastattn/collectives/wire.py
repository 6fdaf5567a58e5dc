"""The form in which values travel between ranks, and how messages in that form are added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Wire(Protocol):
    """The form in which values travel: one contiguous message for a (rows, hidden) tensor."""

    def encode(self, x: Tensor) -> Tensor:
        """The message of ``x``."""
        ...

    def inbox(self, into: Tensor) -> Tensor:
        """Room for the message that ``into`` (rows, hidden) shall hold; may be ``into`` itself."""
        ...

    def read(self, message: Tensor, into: Tensor) -> None:
        """Writes the values of one message."""
        ...

    def add(self, messages: Sequence[Tensor], rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """Sum of what the messages hold, formed in float32 in the order given and rounded once."""
        ...

    def message_bytes(self, rows: int, hidden: int) -> int:
        """Size of a message."""
        ...


_CACHED_VALUES = 1 << 15  # float32 sums of 16-bit values: large temporaries cost more than adding does


class Plain(NamedTuple):
    """Values travel as they are."""

    item_bytes: int = 4  # of the activations: sizes of messages decide how and when they travel

    def encode(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def inbox(self, into: Tensor) -> Tensor:
        return into

    def read(self, message: Tensor, into: Tensor) -> None:
        into.copy_(message)  # nothing where it arrived

    def add(self, messages: Sequence[Tensor], rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        if len(messages) == 1:
            return messages[0]
        wide = torch.promote_types(dtype, torch.float32)
        if len(messages) == 2 or wide == dtype:
            first, second, *others = messages
            total = torch.add(first, second)  # of two, rounded once in any dtype
            for x in others:
                total += x
            return total
        device = messages[0].device
        total = torch.empty((rows, hidden), dtype=dtype, device=device)
        few = max(1, _CACHED_VALUES // hidden)
        scratch = torch.empty((few, hidden), dtype=wide, device=device)
        for lo in range(0, rows, few):
            part = scratch[: min(few, rows - lo)]
            part.copy_(messages[0][lo : lo + few])
            for x in messages[1:]:
                part += x[lo : lo + few]
            total[lo : lo + few] = part
        return total

    def message_bytes(self, rows: int, hidden: int) -> int:
        return rows * hidden * self.item_bytes
