"""What the ranks' link and their half-blocks take, measured by the ranks themselves.

Every function is collective: all ranks call it with the same arguments, measure at once, and get the same
result, the slowest rank's.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import ClassVar, NamedTuple

import torch

from ..collectives.exchange import Lane, Pending, all_gather, all_reduce
from ..collectives.policy import finish
from ..collectives.steps import Exchange, Steps
from ..collectives.wire import Wire
from ..spec import Epilogue, Link, Point, Produce, Rates, Site, Stream, SyncPolicy, TPGroup

SIZES = tuple(64 * 8**i for i in range(6))  # bytes of a message: 64 B to 2 MB
_REPEATS = (3, 50)  # of each size, at least and at most


# ------------------------------------------------------------------------------------------------ ranks
def slowest(g: TPGroup, samples: Sequence[float], where: str) -> list[float]:
    """The largest of the ranks' values, one by one."""
    mine = torch.tensor(samples, dtype=torch.float64)
    found: list[float] = torch.stack(all_gather(g, mine, where)).amax(0).tolist()
    return found


def together(g: TPGroup) -> None:
    """Returns on all ranks within about a hop of each other."""
    _swap(g, "a common start", 1)


def timed(call: Callable[[], object]) -> float:
    """Seconds."""
    begin = perf_counter()
    call()
    return perf_counter() - begin


def _typical(g: TPGroup, call: Callable[[], object], budget_s: float, where: str) -> float:
    """Median of as many calls as ``budget_s`` allows, after one to warm up; the slowest rank's."""
    call()
    (first,) = slowest(g, [timed(call)], where)
    least, most = _REPEATS
    count = max(least, min(most, int(budget_s / max(first, 1e-9))))
    return slowest(g, [statistics.median(timed(call) for _ in range(count))], where)[0]


# ------------------------------------------------------------------------------------------------- link
def link(g: TPGroup, budget_s: float = 0.3) -> Link:
    """The alpha-beta model of one hop, all ranks sending to all others at once, and of the own all-reduce.

    The hop is that of a message whose receiver was ready before.

    ``budget_s``: about what each message size may take; sizes that would take more are left out.
    """
    if g.world == 1:
        raise ValueError("link: one rank has none")
    hop = _Hops(g)
    hops = _by_size(g, hop, budget_s)
    hop.close()
    latency_s, byte_s = fit([((g.world - 1) * size, s) for size, s in hops])
    sums = _by_size(g, partial(_sum, g, "measuring all_reduce"), budget_s)
    steps = 2 * (g.world - 1)
    all_reduce_s, ring_byte_s = fit([(steps * -(-size // g.world), s) for size, s in sums])
    return Link(latency_s, _inverse(byte_s), all_reduce_s, _inverse(ring_byte_s))


def _by_size(g: TPGroup, call: Callable[[int], object], budget_s: float) -> list[tuple[int, float]]:
    found: list[tuple[int, float]] = []
    for size in SIZES:
        if len(found) > 1 and _REPEATS[0] * found[-1][1] > budget_s:
            break
        found.append((size, _typical(g, partial(call, size), budget_s, "measuring the link")))
    return found


def _swap(g: TPGroup, where: str, size: int) -> None:
    """One hop, as `Lane.swap` sees it. Repeated, no rank can be ahead by more than one."""
    others = [r for r in range(g.world) if r != g.rank]
    incoming = {r: torch.empty(size, dtype=torch.uint8) for r in others}
    Lane(g, where).swap(dict.fromkeys(others, torch.zeros(size, dtype=torch.uint8)), incoming).wait()


class _Hops:
    """One hop a call, whose receives were posted in the call before, as `sums` posts them before it computes:
    a message waits for its receiver's announcement of room, which takes a hop itself.
    """

    def __init__(self, g: TPGroup) -> None:
        self._group, self._others = g, [r for r in range(g.world) if r != g.rank]
        self._next: tuple[int, Lane, Pending] | None = None

    def __call__(self, size: int) -> None:
        if self._next and self._next[0] != size:
            self.close()
        now, self._next = self._next or self._post(size), self._post(size)
        self._send(now)

    def close(self) -> None:
        """Answers the last receives."""
        if self._next:
            self._send(self._next)
        self._next = None

    def _post(self, size: int) -> tuple[int, Lane, Pending]:
        lane = Lane(self._group, "measuring the link")
        incoming = {r: torch.empty(size, dtype=torch.uint8) for r in self._others}
        return size, lane, lane.swap({}, incoming)

    def _send(self, posted: tuple[int, Lane, Pending]) -> None:
        size, lane, arriving = posted
        sent = lane.swap(dict.fromkeys(self._others, torch.zeros(size, dtype=torch.uint8)), {})
        arriving.wait()
        sent.wait()


def _sum(g: TPGroup, where: str, size: int) -> None:
    all_reduce(g, torch.zeros(size // 2, dtype=torch.bfloat16), where).wait()


def fit(samples: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(fixed, each), both >= 0, of ``y = fixed + each * x`` with the least squared relative error.

    ``samples``: (x, y), with y > 0. Relative, because a link's latency shows in its smallest message and its
    bandwidth in its largest, which takes a thousand times as long.
    """
    rows = [(1 / y, x / y) for x, y in samples]  # times (fixed, each), this should be 1
    ones, xs = sum(a for a, _ in rows), sum(b for _, b in rows)
    aa, bb = sum(a * a for a, _ in rows), sum(b * b for _, b in rows)
    ab = sum(a * b for a, b in rows)
    determinant = aa * bb - ab * ab
    if determinant > 1e-12 * aa * bb:
        fixed, each = (ones * bb - xs * ab) / determinant, (xs * aa - ones * ab) / determinant
        if fixed >= 0 and each >= 0:
            return fixed, each
        if fixed < 0:
            return 0.0, xs / bb
    return ones / aa, 0.0


def _inverse(byte_s: float) -> float:
    return 1 / byte_s if byte_s > 0 else 1e15


# ---------------------------------------------------------------------------------------------- compute
def value_s(g: TPGroup, wire: Wire, rows: int, hidden: int, dtype: torch.dtype) -> float:
    """Seconds a value to encode one message and decode one of each rank, on one thread (`Rates.value_s`)."""
    x = torch.randn(rows, hidden).to(dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        once = _typical(g, lambda: wire.add([wire.encode(x)] * g.world, rows, hidden, dtype), 0.05, "codec")
    finally:
        torch.set_num_threads(threads)
    return once / (rows * hidden * (1 + g.world))


class Alone:
    """A policy that adds this rank's own partial result, without the others', and notes what that takes."""

    name: ClassVar[str] = "alone"
    exact: ClassVar[bool] = False
    scatters: ClassVar[bool] = False
    needs_full_residual: ClassVar[bool] = True

    def __init__(self) -> None:
        #: Seconds of each half-block and of the residual's addition and norm behind it.
        self.seconds_of: defaultdict[Site, list[tuple[float, float]]] = defaultdict(list)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Exchange[Stream]:
        begin = perf_counter()
        x = make.partial(0, make.rows)
        computed = perf_counter()
        stream = finish(x, s.residual, e)
        end = perf_counter()
        self.seconds_of[p.site].append((computed - begin, end - computed))
        return Exchange(_at_once(stream))

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        return []

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        return 0.0

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        return 0


def _at_once(stream: Stream) -> Steps[Stream]:
    yield from ()
    return stream


class HalfBlock(NamedTuple):
    """Seconds of one half-block of so many rows: partial result, then residual and norm."""

    rows: int
    partial_s: float
    norm_s: float


def half_blocks(
    g: TPGroup, forward: Callable[[SyncPolicy], object], rows: int, repeats: int = 3
) -> dict[Site, HalfBlock]:
    """Medians over the layers and ``repeats`` forwards of ``rows`` rows (after one to warm up).

    ``forward`` runs the model with the policy it is given at every sync point.
    """
    found: dict[Site, HalfBlock] = {}
    forward(Alone())
    alone = Alone()
    for _ in range(repeats):
        together(g)
        forward(alone)
    for site in ("attn", "mlp"):
        columns = [statistics.median(c) for c in zip(*alone.seconds_of[site], strict=True)]
        found[site] = HalfBlock(rows, *slowest(g, columns, "measuring the half-blocks"))
    return found


def rates(found: Sequence[HalfBlock], value_s: float, item_bytes: int, world: int) -> Rates:
    """The line through half-blocks of several numbers of rows; one alone is taken for all fixed cost.

    What does not grow with the rows within these is fixed: a decode step reads all weights however few.
    """
    fixed_s, row_s = fit([(h.rows, h.partial_s + h.norm_s) for h in found])
    norm_row_s = statistics.median(h.norm_s / h.rows for h in found)
    return Rates(fixed_s, row_s, value_s, item_bytes, world, norm_row_s)
