"""How the ranks' tensors are added up, as steps of messages between pairs of ranks.

``x`` is (rows, hidden), of one shape and dtype on all ranks; a `Wire` says in which form values travel.
Every rank adds the same messages in the same order, its own included, so all get the same bits. The number
of hops decides where latency dominates, the bytes of the busiest rank where bandwidth does.

A message leaves when its receiver has announced room for it, which takes a hop of its own. So receives are
posted before ``x`` is computed, and the announcement travels meanwhile (MPI's eager protocol); those of more
than `EAGER_BYTES` after that, as in MPI's rendezvous. The ranks that are ready first would send them while
others compute, whose cores then move frames: that delays the last rank, for which all wait. A star's hub
answers only after the others have sent, so these post their receives before computing, whatever the size.

=============  ====  ==========================  =======================================================
algorithm      hops  bytes a rank sends (of x)
=============  ====  ==========================  =======================================================
`one_step`     1     N - 1                       all to all, everybody adds ("direct")
`two_step`     2     2 (N - 1) / N               everybody adds a share of the rows and sends it to all
`star`         2     hub N - 1, the others 1     TPI-LLM (arXiv 2410.00531)
=============  ====  ==========================  =======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..spec import PackedWeight, Span
from .exchange import Lane
from .steps import Steps
from .wire import Wire

Room = TypeVar("Room")
Shape = tuple[int, int, torch.dtype]  # rows, hidden


def row_spans(rows: int, world: int) -> list[Span]:
    """Rows that each rank adds: contiguous, their numbers differing by one at most."""
    return [(r * rows // world, (r + 1) * rows // world) for r in range(world)]


class Partial(NamedTuple):
    """A (rows, hidden) tensor that ``compute`` will give."""

    rows: int
    hidden: int
    dtype: torch.dtype
    compute: Callable[[], Tensor]
    weight: PackedWeight | None = None  # with gemm_input: compute() is gemm_input() @ weight^T
    gemm_input: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> Shape:
        return self.rows, self.hidden, self.dtype

    def empty(self) -> Tensor:
        """Room for another of its shape."""
        return torch.empty((self.rows, self.hidden), dtype=self.dtype)


EAGER_BYTES = 1 << 19  # that the other ranks may send to one that still computes


def eager(wire: Wire, rows: int, hidden: int, senders: int) -> bool:
    """Whether room for so many rows of each sender is announced before computing."""
    return senders * wire.message_bytes(rows, hidden) <= EAGER_BYTES


def computed(lane: Lane, x: Partial, wire: Wire, rows: int, post: Callable[[], Room]) -> tuple[Tensor, Room]:
    """``x``, and what ``post`` returns, which posts the receives of ``rows`` rows of each other rank."""
    if not eager(wire, rows, x.hidden, len(lane.others)):
        return x.compute(), post()
    room = post()
    return x.compute(), room


def one_step(lane: Lane, x: Partial, wire: Wire) -> Steps[Tensor]:
    """Every rank sends all of its ``x`` to every other one."""

    def post() -> Inbox:
        return Inbox(lane, dict.fromkeys(lane.others, x.rows), x.shape, wire, 0)

    values, inbox = computed(lane, x, wire, x.rows, post)
    mine = wire.encode(values)
    sent = lane.swap(dict.fromkeys(lane.others, mine), {}, 0)
    total = yield from inbox.sum(mine)
    yield sent
    return total


def two_step(
    lane: Lane, x: Partial, wire: Wire, between: Callable[[Tensor], Tensor] = lambda total: total
) -> Steps[Tensor]:
    """A reduce-scatter in one hop and an all-gather in another: each rank adds its `row_spans` share.

    ``between`` gets the sums of this rank's rows; what it returns is gathered instead.
    """
    spans = row_spans(x.rows, lane.group.world)
    lo, hi = spans[lane.group.rank]

    def post() -> tuple[Inbox, Gather]:
        partials = Inbox(lane, dict.fromkeys(lane.others, hi - lo), x.shape, wire, 0)
        return partials, Gather(lane, x.empty(), dict(enumerate(spans)), wire, 1)

    values, (inbox, gather) = computed(lane, x, wire, hi - lo, post)
    due = {r: spans[r] for r in lane.others}
    sent = lane.swap({r: wire.encode(values[a:b]) for r, (a, b) in due.items()}, {}, 0)
    total = yield from inbox.sum(wire.encode(values[lo:hi]))
    result = yield from gather.rows(between(total))
    yield sent
    return result


class Inbox:
    """Room for one message of each rank in ``rows``, of so many, announced to them at once."""

    def __init__(self, lane: Lane, rows: Mapping[int, int], shape: Shape, wire: Wire, step: int) -> None:
        self._lane, self._rows, self._wire = lane, rows, wire
        _, self._hidden, self._dtype = shape
        self._messages = {
            r: wire.inbox(torch.empty((n, self._hidden), dtype=self._dtype)) for r, n in rows.items()
        }
        self._arriving = lane.swap({}, self._messages, step)

    def sum(self, mine: Tensor) -> Steps[Tensor]:
        """Of all ranks' messages, this rank's ``mine`` among them, in the order of the ranks."""
        yield self._arriving
        messages = {**self._messages, self._lane.group.rank: mine}
        (rows,) = set(self._rows.values())
        return self._wire.add([messages[r] for r in sorted(messages)], rows, self._hidden, self._dtype)


class Gather:
    """A tensor of which other ranks send rows, in one hop."""

    def __init__(self, lane: Lane, into: Tensor, spans: Mapping[int, Span], wire: Wire, step: int) -> None:
        """Announces room for the rows of each other rank in ``spans``."""
        self._lane, self._into, self._wire, self._step = lane, into, wire, step
        self._parts = {r: into[lo:hi] for r, (lo, hi) in spans.items()}
        self._messages = {r: wire.inbox(self._parts[r]) for r in lane.others if r in spans}
        self._arriving = lane.swap({}, self._messages, step)

    def rows(self, share: Tensor) -> Steps[Tensor]:
        """Sends this rank's share; every rank reads the same messages, its own included."""
        message, rank = self._wire.encode(share), self._lane.group.rank
        sent = self._lane.swap(dict.fromkeys(self._lane.others, message), {}, self._step)
        self._wire.read(message, self._parts[rank])
        whole = yield from self.read()
        yield sent
        return whole

    def read(self) -> Steps[Tensor]:
        """All rows, when they have arrived."""
        yield self._arriving
        for r, message in self._messages.items():
            self._wire.read(message, self._parts[r])
        return self._into


PIECES = 4  # at most
PIECE_BYTES = 1 << 14  # at least


def pieces(rows: int, wire: Wire, hidden: int) -> list[Span]:
    """How a star's messages are cut."""
    return row_spans(rows, max(1, min(rows, PIECES, wire.message_bytes(rows, hidden) // PIECE_BYTES)))


def star(lane: Lane, x: Partial, wire: Wire, hub: int) -> Steps[Tensor]:
    """Every rank sends to ``hub``, which adds and sends the sum back to all.

    In `pieces`: while the last ones come in, the hub sends the sum of the first ones, so both directions of
    its link, which carries everything, are busy. Other sums keep both busy as they are.
    """
    cut, whole = pieces(x.rows, wire, x.hidden), x.empty()
    if lane.group.rank != hub:
        # Before computing, whatever their size: the hub answers only after this rank has sent.
        answers = [Gather(lane, whole, {hub: span}, wire, PIECES + i) for i, span in enumerate(cut)]
        values = x.compute()
        sent = [lane.swap({hub: wire.encode(values[lo:hi])}, {}, i) for i, (lo, hi) in enumerate(cut)]
        for answer in answers:
            yield from answer.read()
    else:

        def post() -> list[Inbox]:
            rows = [dict.fromkeys(lane.others, hi - lo) for lo, hi in cut]
            return [Inbox(lane, n, x.shape, wire, i) for i, n in enumerate(rows)]

        values, inboxes = computed(lane, x, wire, x.rows, post)
        sent = []
        for i, ((lo, hi), inbox) in enumerate(zip(cut, inboxes, strict=True)):
            total = wire.encode((yield from inbox.sum(wire.encode(values[lo:hi]))))
            sent.append(lane.swap(dict.fromkeys(lane.others, total), {}, PIECES + i))
            wire.read(total, whole[lo:hi])
    yield from sent
    return whole
