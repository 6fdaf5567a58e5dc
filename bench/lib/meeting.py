"""Ranks on one machine that begin something at the same moment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from fastattn.collectives.exchange import all_gather, all_reduce, broadcast
from fastattn.spec import TPGroup

_SPIN_S = 2e-4  # sleeping ends too late by less than this


class Meeting:
    """Ranks leave a barrier one after another, up to several latencies apart. So here rank 0 names a time, on
    the clock that all processes of a machine share, at which all begin: as far ahead as the slowest rank has
    needed so far to hear of it.
    """

    def __init__(self, g: TPGroup) -> None:
        self._group, self._ahead_s, self._late_s, self._begin = g, 1e-3, 0.0, 0.0

    def begin(self) -> None:
        """Returns at the common moment; collective."""
        late = torch.tensor([self._late_s], dtype=torch.float64)
        all_reduce(self._group, late, "ready").wait()
        self._ahead_s += 1.5 * float(late)
        begin = torch.tensor([time.perf_counter() + self._ahead_s], dtype=torch.float64)
        broadcast(self._group, begin, "moment to begin")
        self._begin = float(begin)
        self._late_s = max(0.0, time.perf_counter() - self._begin)
        while (left := self._begin - time.perf_counter()) > 0:
            if left > _SPIN_S:
                time.sleep(left - _SPIN_S)

    def timed(self, call: Callable[[], object]) -> Callable[[], float]:
        """Seconds from the moment at which ``call`` has the ranks begin to the end of this rank's ``call``.

        NaN on a rank that came too late to begin with the others.
        """

        def run() -> float:
            call()
            return math.nan if self._late_s else time.perf_counter() - self._begin

        return run

    def slowest(self, samples: list[float]) -> list[float]:
        """Of all ranks, sample by sample; those to which a rank came too late are left out.

        Raises TimeoutError when none remains.
        """
        mine = torch.tensor(samples, dtype=torch.float64)
        most = torch.stack(all_gather(self._group, mine, "samples")).amax(0)  # NaN if there is one
        if most.isnan().all():
            raise TimeoutError("the ranks never began together: the machine is too busy to measure")
        return [float(s) for s in most if not s.isnan()]

    def same(self, value: int) -> int:
        """Rank 0's, on every rank."""
        shared = torch.tensor([value])
        broadcast(self._group, shared, "number of rounds")
        return int(shared)
