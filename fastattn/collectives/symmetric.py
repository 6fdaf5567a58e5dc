"""The ranks' symmetric memory, in which one kernel sums, adds the residual and normalises (TokenWeave).

GPUs of one machine address each other's memory: the owner of a row reads it from every rank and writes the
normalised row to all of them, between two barriers (`triton_ops.reduce_norm`). `torch.distributed.
_symmetric_memory` provides the memory and the barriers; it is private to torch, and used here alone.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..dispatch import named, order, unavailable
from ..spec import Epilogue, Stream, TPGroup
from .exchange import all_gather, device_of
from .sums import row_spans

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FIRST_BYTES = 1 << 20


class RmsNorm(Protocol):
    """An `Epilogue.norm` that says that it is an RMSNorm, with what a kernel needs to do it."""

    is_rms_norm: ClassVar[bool]
    weight: Tensor
    eps: float


class Memory(Protocol):
    """Memory of one size on every rank, all of which address all of it."""

    mine: Tensor  # uint8 (bytes,): this rank's
    addresses: Tensor  # int64 (world,), of every rank's, on this rank's device
    multicast: int  # address at which the switch adds and copies; 0: there is none

    def barrier(self, channel: int) -> None:
        """What the ranks' streams enqueued before is visible to all behind it."""
        ...


class DeviceMemory:
    """Of GPUs, by torch, around each rank's `room`. Making one is a collective of the group."""

    def __init__(self, g: TPGroup, mine: Tensor) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        assert g.pg is not None
        self.mine = mine
        self._handle: Any = symmetric_memory.rendezvous(mine, g.pg.group_name)
        self._timeout_ms = int(1e3 * g.timeout_s)
        self.addresses = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=mine.device)
        self.multicast = int(self._handle.multicast_ptr)

    def barrier(self, channel: int) -> None:
        """On the current stream; a rank that does not come within the group's timeout ends the kernel."""
        self._handle.barrier(channel=channel, timeout_ms=self._timeout_ms)


class Call(NamedTuple):
    """What decides whether the kernel can run, the same on every rank."""

    rows: int
    hidden: int
    dtype: torch.dtype
    device: torch.device


_memories: weakref.WeakKeyDictionary[Any, DeviceMemory | None] = weakref.WeakKeyDictionary()  # of each group


def reasons_against(c: Call, e: Epilogue) -> list[str]:
    """Why the ranks exchange messages instead; looks only at what all ranks have in common."""
    if c.device.type != "cuda":
        return [f"tensors are on {c.device.type!r}, symmetric memory is of GPUs"]
    reasons = []
    if "triton" not in order(named()):
        reasons.append(f"the backend {named()!r} was asked for, the kernel is Triton's")
    if c.dtype not in _DTYPES:
        reasons.append(f"dtype {c.dtype}, the kernel takes {', '.join(map(str, _DTYPES))}")
    if c.hidden * c.dtype.itemsize % 16:
        reasons.append(f"hidden {c.hidden}: rows are no multiple of 16 bytes")
    if e.bias is not None or not getattr(e.norm, "is_rms_norm", False):
        reasons.append("the kernel adds no bias, and RMSNorm is the only norm that it has")
    return reasons


def room(c: Call, size: int) -> Tensor | None:
    """Memory of this rank that the others can map; None where this process has none, or no kernel for it."""
    if unavailable("triton"):
        return None
    from ..backends.triton import device_reasons

    if device_reasons(c.device, c.dtype):
        return None
    try:  # what torch has of it depends on its version
        import torch.distributed._symmetric_memory as symmetric_memory

        return symmetric_memory.empty(size, dtype=torch.uint8, device=c.device)
    except (ImportError, AttributeError, RuntimeError):
        return None


def memory(c: Call, g: TPGroup) -> DeviceMemory | None:
    """The group's memory, with room for the call; None where a rank has none. A collective when it grows."""
    size = c.rows * c.hidden * c.dtype.itemsize
    found = _memories.get(g.pg)
    if g.pg in _memories and (found is None or found.mine.numel() >= size):
        return found
    made: DeviceMemory | None = None
    mine = room(c, max(_FIRST_BYTES, 1 << (size - 1).bit_length()))
    # Agreed before as well as after: a rank without memory would leave the others waiting in the rendezvous.
    if _everywhere(g, mine is not None) and mine is not None:
        with suppress(RuntimeError):  # no peer access, several ranks on one GPU, several machines
            made = DeviceMemory(g, mine)
        if not _everywhere(g, made is not None):
            made = None
    _memories[g.pg] = made
    return made


def _everywhere(g: TPGroup, here: bool) -> bool:
    flag = torch.tensor([here], dtype=torch.uint8, device=device_of(g))
    return all(int(f) for f in all_gather(g, flag, "symmetric memory"))


def sum_and_normalise(m: Memory, x: Tensor, residual: Tensor, norm: RmsNorm, g: TPGroup) -> Stream:
    """The stream behind a sync point from this rank's partial ``x`` (rows, hidden) and its share of the
    residual (`row_spans`). Every rank gets the same bits.
    """
    from ..triton_ops.reduce_norm import multicast_reduce_norm, reduce_norm

    lo, hi = row_spans(x.shape[0], g.world)[g.rank]
    room = m.mine[: x.numel() * x.element_size()].view(x.dtype).view(x.shape)
    residual = residual.clone(memory_format=torch.contiguous_format)
    room.copy_(x)
    m.barrier(0)
    if hi > lo:
        if m.multicast and x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (9, 0):
            multicast_reduce_norm(m.multicast, x.dtype, residual, lo, norm.weight, norm.eps)
        else:
            reduce_norm(m.addresses, g.world, x.dtype, residual, lo, norm.weight, norm.eps)
    m.barrier(1)
    # The next sync point writes into the same memory, whoever still reads these rows then.
    return Stream(residual, room.clone(), rows=(lo, hi))
