"""How the ranks' tensors are added up, as steps of messages between pairs of ranks.

``x`` is (rows, hidden), of one shape and dtype on all ranks; a `Wire` says in which form values travel.
Every rank adds the same messages in the same order, its own included, so all get the same bits. The number
of hops decides where latency dominates, the bytes of the busiest rank where bandwidth does.

A message leaves when its receiver has announced room for it, which takes a hop of its own. So every receive
of an exchange is posted first, and ``x`` is computed after that: the announcement travels meanwhile.

What is large travels in a few pieces: while one is added (or encoded) the next is on the wire, and a sum's
first rows go on to the second hop before the last ones have arrived.

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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec import PackedWeight, Span
from .exchange import Lane, Pending
from .steps import Steps

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


class Plain(NamedTuple):
    """Values travel as they are."""

    item_bytes: int = 4  # for `message_bytes` alone

    def encode(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def inbox(self, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((rows, hidden), dtype=dtype)

    def add(self, messages: Sequence[Tensor], rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        first, *others = messages
        if not others:
            return first
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.add(first.to(wide), others[0])
        for x in others[1:]:
            total += x
        return total.to(dtype)

    def message_bytes(self, rows: int, hidden: int) -> int:
        return rows * hidden * self.item_bytes


def row_spans(rows: int, world: int) -> list[Span]:
    """Rows that each rank adds: contiguous, their numbers differing by one at most."""
    return [(r * rows // world, (r + 1) * rows // world) for r in range(world)]


PIECES = 4  # at most
PIECE_BYTES = 1 << 14  # at least


def pieces(span: Span, wire: Wire, hidden: int) -> list[Span]:
    """``span`` of rows, cut into what travels as one message each."""
    lo, hi = span
    count = min(PIECES, max(1, wire.message_bytes(hi - lo, hidden) // PIECE_BYTES), hi - lo)
    return [(lo + a, lo + b) for a, b in row_spans(hi - lo, count)] if count else []


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


def one_step(lane: Lane, x: Partial, wire: Wire) -> Steps[Tensor]:
    """Every rank sends all of its ``x`` to every other one."""
    others, cut = lane.others, pieces((0, x.rows), wire, x.hidden)
    inboxes = [Inbox(lane, dict.fromkeys(others, span), x.shape, wire, i) for i, span in enumerate(cut)]
    values = x.compute()
    mine, sent = [], []
    for i, (lo, hi) in enumerate(cut):
        mine.append(wire.encode(values[lo:hi]))
        sent.append(lane.swap(dict.fromkeys(others, mine[-1]), {}, i))
    parts = []
    for message, inbox in zip(mine, inboxes, strict=True):
        parts.append((yield from inbox.sum(message)))
    yield from sent
    return joined(parts, values)


def two_step(
    lane: Lane, x: Partial, wire: Wire, between: Callable[[Tensor, Span], Tensor] = lambda total, _: total
) -> Steps[Tensor]:
    """A reduce-scatter in one hop and an all-gather in another: each rank adds its `row_spans` share.

    ``between`` gets each piece of this rank's sums, and which rows of all they are; what it returns is
    gathered instead.
    """
    others, cut = lane.others, [pieces(s, wire, x.hidden) for s in row_spans(x.rows, lane.group.world)]
    own = cut[lane.group.rank]
    inboxes = [Inbox(lane, dict.fromkeys(others, span), x.shape, wire, i) for i, span in enumerate(own)]
    gather = Gather(lane, x.shape, wire, PIECES)
    values = x.compute()
    sent = []
    for i in range(max(map(len, cut))):
        due = {r: cut[r][i] for r in others if i < len(cut[r])}
        sent.append(lane.swap({r: wire.encode(values[lo:hi]) for r, (lo, hi) in due.items()}, {}, i))
    for (lo, hi), inbox in zip(own, inboxes, strict=True):
        total = yield from inbox.sum(wire.encode(values[lo:hi]))
        gather.bring(between(total, (lo, hi)))
    yield from sent
    return (yield from gather.steps(values))


class Inbox:
    """Room for one message of each rank in ``spans``, of so many rows, announced to them at once."""

    def __init__(self, lane: Lane, spans: Mapping[int, Span], shape: Shape, wire: Wire, step: int) -> None:
        self._lane, self._wire, (_, self._hidden, self._dtype) = lane, wire, shape
        self._rows = {r: hi - lo for r, (lo, hi) in spans.items()}
        self._messages = {r: wire.inbox(n, self._hidden, self._dtype) for r, n in self._rows.items()}
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
    """All rows, of which each rank brings the share that `row_spans` gives it, piece by piece."""

    def __init__(self, lane: Lane, shape: Shape, wire: Wire, step: int) -> None:
        """Announces room for the others' pieces, which take `PIECES` steps of the lane from ``step`` on."""
        self._lane, self._wire, self._step = lane, wire, step
        self._cut = [pieces(span, wire, shape[1]) for span in row_spans(shape[0], lane.group.world)]
        self._inboxes = []
        for i in range(max(map(len, self._cut))):
            due = {r: self._cut[r][i] for r in lane.others if i < len(self._cut[r])}
            self._inboxes.append(Inbox(lane, due, shape, wire, step + i))
        self._own: list[Tensor] = []
        self._sent: list[Pending] = []

    @property
    def mine(self) -> list[Span]:
        """The pieces that this rank brings, as rows of all."""
        return self._cut[self._lane.group.rank]

    def bring(self, values: Tensor) -> None:
        """Sends this rank's next piece."""
        message, step = self._wire.encode(values), self._step + len(self._own)
        self._sent.append(self._lane.swap(dict.fromkeys(self._lane.others, message), {}, step))
        self._own.append(self._wire.add([message], *values.shape, values.dtype))

    def steps(self, empty: Tensor) -> Steps[Tensor]:
        """The rows; ``empty`` where there are none."""
        parts = {(self._lane.group.rank, i): values for i, values in enumerate(self._own)}
        for i, inbox in enumerate(self._inboxes):
            for r, values in (yield from inbox.read()).items():
                parts[r, i] = values
        yield from self._sent
        return joined([parts[key] for key in sorted(parts)], empty)


def star(lane: Lane, x: Partial, wire: Wire, hub: int) -> Steps[Tensor]:
    """Every rank sends to ``hub``, which adds and sends the sum back to all."""
    cut = pieces((0, x.rows), wire, x.hidden)
    if lane.group.rank != hub:
        answers = [Inbox(lane, {hub: span}, x.shape, wire, PIECES + i) for i, span in enumerate(cut)]
        values = x.compute()
        sent = [lane.swap({hub: wire.encode(values[lo:hi])}, {}, i) for i, (lo, hi) in enumerate(cut)]
        parts = []
        for answer in answers:
            parts += (yield from answer.read()).values()
        yield from sent
        return joined(parts, values)
    inboxes = [Inbox(lane, dict.fromkeys(lane.others, span), x.shape, wire, i) for i, span in enumerate(cut)]
    values, parts, sent = x.compute(), [], []
    for i, ((lo, hi), inbox) in enumerate(zip(cut, inboxes, strict=True)):
        total = wire.encode((yield from inbox.sum(wire.encode(values[lo:hi]))))
        sent.append(lane.swap(dict.fromkeys(lane.others, total), {}, PIECES + i))
        parts.append(wire.add([total], hi - lo, x.hidden, x.dtype))
    yield from sent
    return joined(parts, values)


def joined(parts: Sequence[Tensor], empty: Tensor) -> Tensor:
    """The rows of all parts; ``empty`` without any."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else empty
