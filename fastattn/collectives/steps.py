"""Exchanges of several steps that go on while the model computes.

An algorithm is a generator: it posts messages, yields the `Pending` that it needs next, and returns its
result. `Exchange` runs one up to its first messages at once, and the rest when its result is waited for, or,
after `Exchange.overlap`, on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import cache
from typing import Generic, TypeVar

import torch

from ..threads import compute_on_one_thread
from .exchange import Pending

T = TypeVar("T")
Steps = Generator[Pending, None, T]


class Exchange(Generic[T]):
    """An exchange under way; a `spec.Work` when its result is a `Stream`."""

    def __init__(self, steps: Steps[T]) -> None:
        """Runs ``steps`` up to its first messages. Every rank starts the same exchanges in the same order."""
        self._steps = steps
        self._pending: Pending | None = None
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._future: Future[None] | None = None
        # The thread continues with the caller's backend (a context variable) and inference mode.
        self._context, self._inference = copy_context(), torch.is_inference_mode_enabled()
        self._advance()

    def overlap(self) -> Exchange[T]:
        """Hands the remaining steps to a thread, for a caller that computes before it waits.

        Not where messages go on by themselves: a thread that waited for a device's would have the caller's
        computations, which are queued behind, wait as well; one that looks at memory takes a core.
        """
        if self._future is None and self._pending is not None and not self._pending.goes_on:
            self._future = _thread().submit(self._context.run, self._on_thread)
        return self

    def wait(self) -> T:
        """The result; raises `SyncError` within the group's timeout, a step. A second call says the same."""
        if self._future is None or self._future.cancel():  # what has not begun is done faster here
            self._finish()
        else:
            self._future.result()
        return self._result[0]

    def cancel(self) -> None:
        """Waits for the end and ignores how it ended: messages cannot be withdrawn."""
        with suppress(Exception):
            self.wait()
        if self._error is not None and self._pending is not None:
            self._pending.cancel()

    def _on_thread(self) -> None:
        with torch.inference_mode(self._inference):
            self._finish()

    def _finish(self) -> None:
        if self._error is not None:
            raise self._error
        try:
            while self._pending is not None:
                self._pending.wait()
                self._advance()
        except BaseException as error:
            # Going on would send the other ranks sums of what never came.
            self._error = error
            self._steps.close()
            raise

    def _advance(self) -> None:
        try:
            self._pending = next(self._steps)
        except StopIteration as end:
            self._pending = None
            self._result.append(end.value)


@cache
def _thread() -> ThreadPoolExecutor:
    # OpenMP is entered from the model's thread only, and the cores are the model's.
    return ThreadPoolExecutor(1, thread_name_prefix="fastattn-sync", initializer=compute_on_one_thread)
