"""The alpha-beta model of the algorithms in `sums`: latency and bytes of each hop, work on each value.

A hop takes the link's latency and the time of the bytes that the busiest rank sends or receives in it.
"""

from __future__ import annotations

from ..spec import Link, Rates
from .sums import eager, pieces
from .wire import Wire


def hop(link: Link, sent: int) -> float:
    """Seconds of one hop in which a rank sends ``sent`` bytes."""
    return link.latency_s + sent / link.bytes_per_s


def announcement(wire: Wire, rows: int, hidden: int, link: Link, world: int) -> float:
    """Seconds until the senders of so many rows each hear of room for them, after this rank has computed."""
    return 0.0 if eager(wire, rows, hidden, world - 1) else link.latency_s


def one_step_bytes(wire: Wire, rows: int, hidden: int, world: int) -> int:
    """Bytes that each rank sends."""
    return (world - 1) * wire.message_bytes(rows, hidden)


def two_step_bytes(wire: Wire, rows: int, hidden: int, world: int) -> int:
    """Bytes that the rank with the most sends: the other shares, and then its own to all others."""
    share = -(-rows // world)
    return (world - 1) * 2 * wire.message_bytes(share, hidden)


def star_bytes(wire: Wire, rows: int, hidden: int, world: int) -> int:
    """Bytes that the hub sends."""
    return (world - 1) * wire.message_bytes(rows, hidden)


def one_step_seconds(wire: Wire, rows: int, hidden: int, link: Link, rate: Rates) -> float:
    """Encode one message, decode one a rank."""
    if rate.world == 1:
        return 0.0
    values = rows * hidden * (1 + rate.world)
    asked = announcement(wire, rows, hidden, link, rate.world)
    return asked + hop(link, one_step_bytes(wire, rows, hidden, rate.world)) + values * rate.value_s


def two_step_seconds(wire: Wire, rows: int, hidden: int, link: Link, rate: Rates) -> float:
    """Encode and decode everything once, and a share of the rows once more."""
    if rate.world == 1:
        return 0.0
    share, each = -(-rows // rate.world), two_step_bytes(wire, rows, hidden, rate.world) // 2
    values = hidden * (3 * rows + share)
    asked = announcement(wire, share, hidden, link, rate.world)
    return asked + 2 * hop(link, each) + values * rate.value_s


def star_seconds(wire: Wire, rows: int, hidden: int, link: Link, rate: Rates) -> float:
    """All messages meet on the hub's link, in both directions: out as soon as the first piece is in."""
    if rate.world == 1:
        return 0.0
    values = rows * hidden * (3 + rate.world)
    sent, count = star_bytes(wire, rows, hidden, rate.world), len(pieces(rows, wire, hidden))
    asked = announcement(wire, rows, hidden, link, rate.world)
    return asked + hop(link, sent) + hop(link, sent // max(1, count)) + values * rate.value_s
