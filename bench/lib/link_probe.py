"""One rank of the self-check of bench/links.py: `link_probe.py RESULT BYTES`, over plain TCP sockets.

Rank 0 times round trips of one byte to rank 1, then streams of BYTES, as their receivers see them: from rank
1, from and to rank 1 at once, from all others at once, to all others at once. The ranks share one machine's
clock. Imports no torch: it starts quickly.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

PORT = 5000
ROUND_TRIPS = 100
CHUNK = 1 << 18
# What to do ("e"cho, "s"end, "r"eceive, both "d"irections), and how many bytes.
ORDER = struct.Struct("!cQ")
ARRIVED = struct.Struct("!ddQ")


class Arrived(NamedTuple):
    """Times of a stream's first and last arrival, and the bytes that came after the first."""

    begin: float
    end: float
    later: int


def rate(streams: Iterable[Arrived]) -> float:
    """Bytes per second of all together."""
    begins, ends, counts = zip(*streams, strict=True)
    return float(sum(counts) / (max(ends) - min(begins)))


def send(conn: socket.socket, size: int) -> None:
    chunk = memoryview(bytes(CHUNK))
    for begin in range(0, size, CHUNK):
        conn.sendall(chunk[: size - begin])


def receive(conn: socket.socket, size: int) -> Arrived:
    buffer = bytearray(CHUNK)
    got = first = conn.recv_into(buffer, min(CHUNK, size))
    begin = end = time.perf_counter()
    while got < size:
        chunk = conn.recv_into(buffer, min(CHUNK, size - got))
        if not chunk:
            raise ConnectionError("the other rank ended")
        got, end = got + chunk, time.perf_counter()
    return Arrived(begin, end, got - first)


def report(conn: socket.socket) -> Arrived:
    """What `receive` saw on the other side."""
    return Arrived(*ARRIVED.unpack(conn.recv(ARRIVED.size, socket.MSG_WAITALL)))


def order(conn: socket.socket, what: bytes, count: int) -> None:
    conn.sendall(ORDER.pack(what, count))


def obey(conn: socket.socket, pool: ThreadPoolExecutor) -> None:
    """What a rank other than 0 does."""
    while head := conn.recv(ORDER.size, socket.MSG_WAITALL):
        what, count = ORDER.unpack(head)
        if what == b"e":
            for _ in range(count):
                conn.sendall(conn.recv(1))
        sending = pool.submit(send, conn, count) if what in b"sd" else None
        seen = receive(conn, count) if what in b"rd" else None
        if sending:
            sending.result()
        if seen:
            conn.sendall(ARRIVED.pack(*seen))


def round_trips(conn: socket.socket) -> list[float]:
    order(conn, b"e", ROUND_TRIPS)
    taken = []
    for _ in range(ROUND_TRIPS):
        begin = time.perf_counter()
        conn.sendall(b"x")
        conn.recv(1)
        taken.append(time.perf_counter() - begin)
    return taken


def arriving(conns: list[socket.socket], size: int, pool: ThreadPoolExecutor) -> float:
    """Bytes per second that come from all ``conns`` together."""
    for conn in conns:
        order(conn, b"s", size // len(conns))
    return rate(pool.map(lambda c: receive(c, size // len(conns)), conns))


def leaving(conns: list[socket.socket], size: int, pool: ThreadPoolExecutor) -> float:
    """Bytes per second that reach all ``conns`` together."""
    for conn in conns:
        order(conn, b"r", size // len(conns))
    list(pool.map(lambda c: send(c, size // len(conns)), conns))
    return rate(map(report, conns))


def both_ways(conn: socket.socket, size: int, pool: ThreadPoolExecutor) -> float:
    """Bytes per second of the slower direction."""
    order(conn, b"d", size)
    sending = pool.submit(send, conn, size)
    mine = receive(conn, size)
    sending.result()
    return min(rate([mine]), rate([report(conn)]))


def main() -> None:
    result, size = Path(sys.argv[1]), int(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with ThreadPoolExecutor(world) as pool:
        if rank:
            with _connect(os.environ["MASTER_ADDR"]) as conn:
                conn.sendall(bytes([rank]))
                obey(conn, pool)
            return
        with socket.create_server(("", PORT)) as server:
            accepted = [server.accept()[0] for _ in range(world - 1)]
        by_rank = {conn.recv(1)[0]: conn for conn in accepted}
        for conn in accepted:
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        first = by_rank[1]
        facts = {
            "round_trips_s": round_trips(first),
            "one_way": arriving([first], size, pool),
            "both_ways": both_ways(first, size, pool),
            "all_to_one": arriving(accepted, size, pool),
            "one_to_all": leaving(accepted, size, pool),
        }
        for conn in accepted:
            conn.close()
    result.write_text(json.dumps(facts))


def _connect(address: str) -> socket.socket:
    """Rank 0 may still be starting."""
    end = time.monotonic() + 30
    while True:
        conn = socket.socket()
        error = conn.connect_ex((address, PORT))
        if not error:
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return conn
        conn.close()
        if time.monotonic() > end:
            raise ConnectionError(f"rank 0 does not answer: {os.strerror(error)}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
