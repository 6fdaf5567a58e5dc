"""How the ranks' tensors are added up, as steps of messages between pairs of ranks.

``x`` is (rows, hidden), of one shape and dtype on all ranks; a `Wire` says in which form values travel.
Every rank adds the same messages in the same order, its own included, so all get the same bits. The number
of hops decides where latency dominates, the bytes of the busiest rank where bandwidth does.

A message leaves when its receiver has announced room for it, which takes a hop of its own. So every receive
of an exchange is posted first, and ``x`` is computed after that: the announcement travels meanwhile.

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

from ..spec import PackedWeight
from .exchange import Lane
from .steps import Steps

Span = tuple[int, int]


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


class Partial(NamedTuple):
    """A (rows, hidden) tensor that ``compute`` will give."""

    rows: int
    hidden: int
    dtype: torch.dtype
    compute: Callable[[], Tensor]
    weight: PackedWeight | None = None  # with gemm_input: compute() is gemm_input() @ weight^T
    gemm_input: Callable[[], Tensor] | None = None


def one_step(lane: Lane, x: Partial, wire: Wire) -> Steps[Tensor]:
    """Every rank sends all of its ``x`` to every other one."""
    others = [r for r in range(lane.group.world) if r != lane.group.rank]
    messages = {r: wire.inbox(x.rows, x.hidden, x.dtype) for r in others}
    arriving = lane.swap({}, messages)
    mine = wire.encode(x.compute())
    sent = lane.swap(dict.fromkeys(others, mine), {})
    yield arriving
    yield sent
    return wire.add(_in_order(lane, mine, messages), x.rows, x.hidden, x.dtype)


def two_step(lane: Lane, x: Partial, wire: Wire) -> Steps[Tensor]:
    """`scatter_sum`, then `gather_rows`."""
    inbox = RowInbox(lane, x.rows, x.hidden, x.dtype, wire)
    share = yield from scatter_sum(lane, x, wire)
    return (yield from gather_rows(lane, share, wire, inbox))


def scatter_sum(lane: Lane, x: Partial, wire: Wire) -> Steps[Tensor]:
    """The sum of this rank's share of the rows (`row_spans`): a reduce-scatter in one hop, step 0."""
    g = lane.group
    spans = row_spans(x.rows, g.world)
    lo, hi = spans[g.rank]
    messages = {}
    if lo < hi:
        messages = {r: wire.inbox(hi - lo, x.hidden, x.dtype) for r in range(g.world) if r != g.rank}
    arriving = lane.swap({}, messages)
    values = x.compute()
    filled = {r: (a, b) for r, (a, b) in enumerate(spans) if r != g.rank and a < b}
    sent = lane.swap({r: wire.encode(values[a:b]) for r, (a, b) in filled.items()}, {})
    yield arriving
    yield sent
    if lo == hi:
        return values[:0]
    return wire.add(_in_order(lane, wire.encode(values[lo:hi]), messages), hi - lo, x.hidden, x.dtype)


class RowInbox:
    """Room for the other ranks' shares of a tensor of ``rows``, announced to them at once."""

    def __init__(
        self, lane: Lane, rows: int, hidden: int, dtype: torch.dtype, wire: Wire, step: int = 1
    ) -> None:
        self.step, me = step, lane.group.rank
        self.sizes = {r: hi - lo for r, (lo, hi) in enumerate(row_spans(rows, lane.group.world)) if lo < hi}
        self.messages = {r: wire.inbox(n, hidden, dtype) for r, n in self.sizes.items() if r != me}
        self.arriving = lane.swap({}, self.messages, step)


def gather_rows(lane: Lane, share: Tensor, wire: Wire, inbox: RowInbox) -> Steps[Tensor]:
    """All rows, of which each rank brings the ``share`` that `row_spans` gives it, in one hop."""
    g, hidden, dtype = lane.group, share.shape[1], share.dtype
    messages = dict(inbox.messages)
    if g.rank in inbox.sizes:
        messages[g.rank] = wire.encode(share)
        sent = lane.swap({r: messages[g.rank] for r in range(g.world) if r != g.rank}, {}, inbox.step)
    else:
        sent = lane.swap({}, {}, inbox.step)
    yield inbox.arriving
    yield sent
    parts = [wire.add([messages[r]], n, hidden, dtype) for r, n in inbox.sizes.items()]
    return torch.cat(parts) if parts else share


def star(lane: Lane, x: Partial, wire: Wire, hub: int) -> Steps[Tensor]:
    """Every rank sends to ``hub``, which adds and sends the sum back to all."""
    g, shape = lane.group, (x.rows, x.hidden, x.dtype)
    if g.rank != hub:
        answer = wire.inbox(*shape)
        answered = lane.swap({}, {hub: answer}, step=1)
        yield lane.swap({hub: wire.encode(x.compute())}, {})
        yield answered
        return wire.add([answer], *shape)
    others = [r for r in range(g.world) if r != hub]
    messages = {r: wire.inbox(*shape) for r in others}
    arriving = lane.swap({}, messages)
    mine = wire.encode(x.compute())
    yield arriving
    total = wire.encode(wire.add(_in_order(lane, mine, messages), *shape))
    yield lane.swap(dict.fromkeys(others, total), {}, step=1)
    return wire.add([total], *shape)


def _in_order(lane: Lane, mine: Tensor, messages: Mapping[int, Tensor]) -> list[Tensor]:
    return [mine if r == lane.group.rank else messages[r] for r in range(lane.group.world)]
