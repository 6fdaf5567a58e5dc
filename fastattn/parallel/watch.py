"""Watching the ranks: when the process of one ends, the others end too, whatever they are doing.

An exchange notices an ended rank by itself. A rank that loads, computes or still waits in start-up does not,
so each keeps a TCP connection to rank 0 on which nothing travels but a farewell: the kernel closes it when a
process ends, however it ends, and rank 0 tells the others who it was. A stopped process and a cut link close
nothing: those are for the timeouts of the exchanges. So is a rank that ended before it connected, which
nobody can tell from one that is late.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

_KEY = "watch"  # in the store: where rank 0 listens, and the token
_TOKEN_BYTES = 16  # that a rank's connection begins with; a stranger's does not
_HELLO_S = 1.0  # a stranger may keep us waiting for it
_RETRY_S = 0.1  # a connection that cannot be accepted stays ready to be
_GRACE_S = 2.0  # for an exchange to notice first: its message says more, and its caller may clean up
_FAREWELL = -1


class Store(Protocol):
    """What a `torch.distributed` store does here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...


class Watch:
    """This rank's connections to the others, and the thread that listens on them."""

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        host: str,
        timeout_s: float,
        on_loss: Callable[[int], None],
    ) -> None:
        """``host``: address of rank 0, which announces in ``store`` where it listens. ``on_loss`` is called
        in the watching thread with the rank whose process ended, unless `leave` came first.

        Raises OSError, or the store's RuntimeError, when rank 0 cannot be reached within ``timeout_s``.
        """
        self._on_loss, self._missing = on_loss, world - 1
        self._leaving, self._farewell = threading.Event(), False
        self._lost: int | None = None
        self._told = threading.Event()
        self._peers: dict[socket.socket, int] = {}
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        if rank == 0:
            self._listener = _listen()
            self._token = secrets.token_bytes(_TOKEN_BYTES)
            self._selector.register(self._listener, selectors.EVENT_READ)
            store.set(_KEY, f"{self._listener.getsockname()[1]} {self._token.hex()}")
        else:
            port, token = store.get(_KEY).decode().split()
            connection = socket.create_connection((host, int(port)), timeout_s)
            connection.sendall(bytes.fromhex(token) + _encode(rank))
            self._add(connection, 0)
        self._wake, wakened = socket.socketpair()
        self._selector.register(wakened, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="fastattn-watch", daemon=True)
        self._thread.start()

    def leave(self, *, farewell: bool) -> None:
        """Stops watching. Without ``farewell`` the other ranks take this one as lost."""
        self._farewell = farewell
        self._leaving.set()
        with self._wake, suppress(OSError):  # the thread has ended by itself
            self._wake.send(b"\0")
        self._thread.join(_HELLO_S + 1)

    def first_lost(self, seconds: float) -> int | None:
        """The rank whose process ended first, once it is known and the others have been told; None if nothing
        is heard of one within ``seconds``.
        """
        self._told.wait(seconds)
        return self._lost

    def _run(self) -> None:
        lost = None
        while lost is None and not self._leaving.is_set():
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._admit(self._listener)
                elif key.fileobj in self._peers and lost is None:
                    lost = self._hear(key.fileobj)
        if lost is not None:
            self._tell(lost)
            self._lost = lost
            self._told.set()
            if not self._leaving.wait(_GRACE_S):
                self._on_loss(lost)
        elif self._farewell:
            self._admit_waiting()
            self._tell(_FAREWELL)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _admit_waiting(self) -> None:
        """Those that have connected: to them a closed listener looks like a lost rank."""
        while self._missing and any(key.fileobj is self._listener for key, _ in self._selector.select(0)):
            assert self._listener
            self._admit(self._listener)

    def _admit(self, listener: socket.socket) -> None:
        """Takes in a rank; after the last one, nobody listens any more."""
        try:
            connection, _ = listener.accept()
        except OSError:  # it has gone again, or this process has no descriptor left: it may have one later
            self._leaving.wait(_RETRY_S)
            return
        connection.settimeout(_HELLO_S)
        hello = _receive(connection, _TOKEN_BYTES + 4)
        token, rank = hello[:_TOKEN_BYTES], hello[_TOKEN_BYTES:]
        if len(rank) < 4 or not secrets.compare_digest(token, self._token):
            connection.close()
            return
        self._add(connection, _decode(rank))
        self._missing -= 1
        if self._missing == 0:
            self._selector.unregister(listener)
            listener.close()

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(None)
        self._peers[connection] = rank
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> int | None:
        """The rank that ended, by its own connection or by word of rank 0; None after a farewell."""
        message = _receive(connection, 4)
        rank = self._peers.pop(connection)
        self._selector.unregister(connection)
        connection.close()
        if len(message) < 4:
            return rank
        said = _decode(message)
        return None if said == _FAREWELL else said

    def _tell(self, message: int) -> None:
        for connection in self._peers:
            with suppress(OSError):  # it has ended as well
                connection.sendall(_encode(message))


def _listen() -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", 0), family=family, dualstack_ipv6=both)


def _receive(connection: socket.socket, count: int) -> bytes:
    """``count`` bytes, or fewer when the connection ended or, where it has a timeout, nothing came."""
    received = b""
    with suppress(OSError):
        while len(received) < count and (piece := connection.recv(count - len(received))):
            received += piece
    return received


def _encode(number: int) -> bytes:
    return number.to_bytes(4, "big", signed=True)


def _decode(number: bytes) -> int:
    return int.from_bytes(number, "big", signed=True)
