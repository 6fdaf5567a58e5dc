"""An exchange that failed stays failed: no later step runs on messages that never came."""

from __future__ import annotations

import threading
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from fastattn.collectives import exchange
from fastattn.collectives.exchange import Pending
from fastattn.collectives.steps import Exchange
from fastattn.spec import SyncError, TPGroup


class Broken:
    """A `Pending` whose first work fails; as the real one, it has nothing left for a second wait."""

    goes_on = False

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
    under_way = Exchange(steps(pending, reached))
    if background:
        under_way.overlap()
    for _ in range(2):
        with pytest.raises(SyncError, match="late"):
            under_way.wait()
    under_way.cancel()
    assert (reached, pending.waits, pending.cancelled) == ([], 1, 1)


class Work:
    """A message that notes which thread waited for it."""

    def __init__(self) -> None:
        self.waited: list[int] = []
        self.seen = threading.Event()

    def wait(self) -> None:
        self.waited.append(threading.get_ident())
        self.seen.set()


@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_streams_go_on_by_themselves(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's wait would stop the stream that the caller goes on to use: on a device there is none."""
    monkeypatch.setattr(exchange, "device_of", lambda group: SimpleNamespace(type=device))
    work, reached = Work(), []  # type: ignore[var-annotated]
    group = TPGroup(None, 0, 2, 1.0, (0.5, 0.5))
    under_way = Exchange(steps(Pending(group, "test", [(None, work)]), reached)).overlap()
    if device == "cpu":
        assert work.seen.wait(10)
    else:
        assert not work.waited
    assert under_way.wait() == "a sum of nothing"
    assert reached == ["second step"]
    assert (work.waited == [threading.get_ident()]) == (device != "cpu")
