"""How the ranks' tensors are added up, as steps of messages between pairs of ranks.

``x`` is (rows, hidden), of one shape and dtype on all ranks; a `Wire` says in which form values travel.
Every rank adds the same messages in the same order, its own included, so all get the same bits. The number
of hops decides where latency dominates, the bytes of the busiest rank where bandwidth does.

A message leaves when its receiver has announced room for it, which takes a hop of its own. So receives are
posted before ``x`` is computed, and the announcement travels meanwhile (MPI's eager protocol); those of more
than `EAGER_BYTES` after that, as in MPI's rendezvous. The ranks that are ready first would send them while
others compute, whose cores then move frames: that delays the last rank, for which all wait.

=============  ====  ==========================  =======================================================
algorithm      hops  bytes a rank sends (of x)
=============  ====  ==========================  =======================================================
`one_step`     1     N - 1                       all to all, everybody adds ("direct")
`two_step`     2     2 (N - 1) / N               everybody adds a share of the rows and sends it to all
`star`         2     hub N - 1, the others 1     TPI-LLM (arXiv 2410.00531)
=============  ====  ==========================  =======================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..spec import PackedWeight, Span
from .exchange import Lane
from .steps import Steps

Room = TypeVar("Room")
Shape = tuple[int, int, torch.dtype]  # rows, hidden


class Wire(Protocol):
    """The form in which values travel: one contiguous message for a (rows, hidden) tensor."""

    def encode(self, x: Tensor) -> Tensor:
        """The message of ``x``."""
        ...

    def inbox(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """Room for the message of another rank's tensor."""
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

    item_bytes: int = 4  # for `message_bytes` alone

    def encode(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def inbox(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, hidden), dtype=dtype)

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
        return partials, Gather(lane, x.shape, wire, 1)

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
        self._messages = {r: wire.inbox(n, self._hidden, self._dtype) for r, n in rows.items()}
        self._arriving = lane.swap({}, self._messages, step)

    def sum(self, mine: Tensor) -> Steps[Tensor]:
        """Of all ranks' messages, this rank's ``mine`` among them, in the order of the ranks."""
        yield self._arriving
        messages = {**self._messages, self._lane.group.rank: mine}
        (rows,) = set(self._rows.values())
        return self._wire.add([messages[r] for r in sorted(messages)], rows, self._hidden, self._dtype)

    def read(self) -> Steps[dict[int, Tensor]]:
        """What each rank sent."""
        yield self._arriving
        shape = self._hidden, self._dtype
        return {r: self._wire.add([m], self._rows[r], *shape) for r, m in self._messages.items()}


class Gather:
    """All rows, of which each rank brings the share that `row_spans` gives it, in one hop."""

    def __init__(self, lane: Lane, shape: Shape, wire: Wire, step: int) -> None:
        """Announces room for the others' shares."""
        self._lane, self._wire, self._step = lane, wire, step
        spans = row_spans(shape[0], lane.group.world)
        rows = {r: spans[r][1] - spans[r][0] for r in lane.others}
        self._inbox = Inbox(lane, rows, shape, wire, step)

    def rows(self, share: Tensor) -> Steps[Tensor]:
        """Sends this rank's share; every rank reads the same messages, its own included."""
        message, (rows, hidden) = self._wire.encode(share), share.shape
        sent = self._lane.swap(dict.fromkeys(self._lane.others, message), {}, self._step)
        parts = {self._lane.group.rank: self._wire.add([message], rows, hidden, share.dtype)}
        parts |= yield from self._inbox.read()
        yield sent
        return torch.cat([parts[r] for r in sorted(parts)])


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
    cut = pieces(x.rows, wire, x.hidden)
    sizes = [hi - lo for lo, hi in cut]
    if lane.group.rank != hub:
        answers = [Inbox(lane, {hub: n}, x.shape, wire, PIECES + i) for i, n in enumerate(sizes)]
        values = x.compute()
        sent = [lane.swap({hub: wire.encode(values[lo:hi])}, {}, i) for i, (lo, hi) in enumerate(cut)]
        parts: list[Tensor] = []
        for answer in answers:
            parts += (yield from answer.read()).values()
    else:

        def post() -> list[Inbox]:
            return [Inbox(lane, dict.fromkeys(lane.others, n), x.shape, wire, i) for i, n in enumerate(sizes)]

        values, inboxes = computed(lane, x, wire, x.rows, post)
        parts, sent = [], []
        for i, ((lo, hi), inbox) in enumerate(zip(cut, inboxes, strict=True)):
            total = wire.encode((yield from inbox.sum(wire.encode(values[lo:hi]))))
            sent.append(lane.swap(dict.fromkeys(lane.others, total), {}, PIECES + i))
            parts.append(wire.add([total], hi - lo, x.hidden, x.dtype))
    yield from sent
    return torch.cat(parts) if len(parts) > 1 else parts[0]
