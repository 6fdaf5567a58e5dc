"""Which network interface leads to an address (Linux, IPv4)."""

from __future__ import annotations

import socket
import struct
import sys


def interface_towards(host: str) -> str | None:
    """Name of the local interface whose address packets to ``host`` carry; None when it cannot be told."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # a datagram socket: chooses the route, sends nothing
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address(probe, name) == address:
                    return name
    except OSError:
        return None
    return None


def _address(sock: socket.socket, name: str) -> str | None:
    import fcntl  # absent outside Unix

    siocgifaddr = 0x8915  # linux/sockios.h
    try:
        answer = fcntl.ioctl(sock.fileno(), siocgifaddr, struct.pack("256s", name.encode()[:15]))
    except OSError:
        return None  # the interface has no IPv4 address
    return socket.inet_ntoa(answer[20:24])
