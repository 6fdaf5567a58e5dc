"""Collectives between the ranks of one machine, through memory that all of them have mapped.

A decoded token sums a few kilobytes at each of its sync points. Over sockets that is mostly threads that wake
each other up; here a rank writes its operand where the others read it, and looks at their counters until they
have done the same. The native part (native/src/shared_memory.cpp) waits in slices: between two of them Python
hears of signals and of ranks that ended.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..native import kernels
from ..spec import SyncError

_SLOTS, _SLOT_BYTES = 8, 1 << 17  # of each rank: what it may post before the others have read it
_SLICE_S = 0.05
Where = Callable[[int], str]

_SUMMED = (torch.float32, torch.float16, torch.bfloat16)
_CARRIED = (*_SUMMED, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


class SharedMemory:
    """One group's operations. Every rank starts the same ones in the same order, and ends them in any."""

    def __init__(
        self, rank: int, world: int, timeout_s: float, memory: mmap.mmap, lost: Callable[[], int | None]
    ) -> None:
        """``memory``: `bytes_for` (world) zeros, mapped by all ranks. ``lost``: a rank that ended, if any."""
        self._native = kernels.SharedMemory(memory, rank, world, _SLOTS, _SLOT_BYTES)
        self._rank, self._world, self._timeout_s, self._lost = rank, world, timeout_s, lost
        self._operands: dict[int, tuple[Tensor, ...]] = {}  # of what has not ended: its memory is in use
        self._failed: SyncError | None = None

    @staticmethod
    def bytes_for(world: int) -> int:
        """Bytes of memory that ``world`` ranks share."""
        return int(kernels.SharedMemory.bytes_of(world, _SLOTS, _SLOT_BYTES))

    def sums(self, x: Tensor) -> bool:
        """Whether `sum` takes x."""
        return x.dtype in _SUMMED and x.device.type == "cpu"

    def carries(self, x: Tensor) -> bool:
        """Whether `gather` and `broadcast` take x."""
        return x.dtype in _CARRIED and x.device.type == "cpu"

    def sum(self, x: Tensor, where: str) -> Sharing:
        """``x`` becomes the sum of the ranks' ``x``, formed in float32 in the order of the ranks."""
        return self._started(self._native.sum(x), (x,), where)

    def gather(self, x: Tensor, where: str) -> list[Tensor]:
        """Every rank's ``x``, in rank order."""
        out = x.new_empty((self._world, *x.shape))
        self._started(self._native.gather(x, out), (x, out), where).wait()
        return list(out.unbind(0))

    def broadcast(self, x: Tensor, where: str, source: int) -> None:
        """``x`` becomes rank ``source``'s."""
        self._started(self._native.broadcast(x, source), (x,), where).wait()

    def _started(self, number: int, operands: tuple[Tensor, ...], where: str) -> Sharing:
        self._operands[number] = operands
        return Sharing(self, number, where)

    def finish(self, number: int, where: str) -> None:
        """Ends all operations up to ``number``. After a `SyncError` every later call raises it again."""
        begin = time.monotonic()
        with self._final(where):
            while (late := self._native.finish(number, _SLICE_S)) >= 0:
                self._go_on(where, late, time.monotonic() - begin)
        for ended in [n for n in self._operands if n <= number]:
            del self._operands[ended]

    def within(self, call: Callable[[Any, Callable[[int, int, float], None]], None], where: Where) -> None:
        """Runs ``call(native, overdue)``, native code that starts and ends operations of its own, the i-th of
        them ``where(i)``. It calls ``overdue`` between slices of a wait (native/src/on_shared_memory.hpp).
        """
        with self._final("forward"):
            call(self._native, lambda i, late, waited_s: self._go_on(where(i), late, waited_s))

    def _go_on(self, where: str, late: int, waited_s: float) -> None:
        """Raises `SyncError` when the wait for rank ``late`` has no hope."""
        if (lost := self._lost()) is not None:
            raise SyncError(self._rank, where, f"rank {lost} ended")
        if waited_s > self._timeout_s:
            reason = f"no answer within {self._timeout_s:g} s: rank {late} is stopped or late"
            raise SyncError(self._rank, f"{where}, with rank {late}", reason)

    @contextmanager
    def _final(self, where: str) -> Iterator[None]:
        """An operation that did not end: the ranks are out of step, and no other one may begin."""
        if self._failed is not None:
            raise self._failed
        try:
            yield
        except ValueError:  # an argument: nothing was started
            raise
        except SyncError as error:
            self._failed = error
            raise
        except RuntimeError as error:
            self._failed = SyncError(self._rank, where, f"the ranks differ: {error}")
            raise self._failed from None
        except BaseException as error:  # Ctrl-C
            self._failed = SyncError(self._rank, where, f"ended by {type(error).__name__}")
            raise


class Sharing(NamedTuple):
    """An operation under way."""

    memory: SharedMemory
    number: int
    where: str

    def wait(self) -> None:
        """Returns when its result is there; raises `SyncError`. Cheap when it has ended."""
        self.memory.finish(self.number, self.where)
