"""An exchange that failed stays failed: no later step runs on messages that never came."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from fastattn.collectives.steps import Exchange
from fastattn.spec import SyncError


class Broken:
    """A `Pending` whose first work fails; as the real one, it has nothing left for a second wait."""

    def __init__(self) -> None:
        self.waits, self.cancelled = 0, 0

    def wait(self) -> None:
        self.waits += 1
        if self.waits == 1:
            raise SyncError(0, "test", "late")

    def cancel(self) -> None:
        self.cancelled += 1


def steps(pending: Any, reached: list[str]) -> Generator[Any, None, str]:
    yield pending
    reached.append("second step")
    return "a sum of nothing"


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_step_is_the_last(background: bool) -> None:
    pending, reached = Broken(), []  # type: ignore[var-annotated]
    exchange = Exchange(steps(pending, reached))
    if background:
        exchange.overlap()
    for _ in range(2):
        with pytest.raises(SyncError, match="late"):
            exchange.wait()
    exchange.cancel()
    assert (reached, pending.waits, pending.cancelled) == ([], 1, 1)
