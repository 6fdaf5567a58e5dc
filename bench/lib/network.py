"""Ranks on machines of their own: network namespaces joined by a switch with a set rate and latency.

The switch is a program in user space (bench/lib/switch), compiled on first use: this kernel's queueing
disciplines need not be there. What its rate and latency mean is written at the top of switch.cpp; in short, a
lone message of b bytes takes b / rate + latency, and a rank sends and receives at most at the rate, each.
Ethernet, IP and TCP headers take 4.4 % of it.

The namespaces have no names and live as long as the switch does, which ends with the pipe to this process:
so nothing is left behind however the program ends, and two runs cannot meet.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastattn.spec import Link

SOURCES = Path(__file__).resolve().parent / "switch"
CACHE = Path(__file__).resolve().parents[2] / "build" / "switch"
INTERFACE = "eth0"
PAYLOAD = (1500 - 52) / (1500 + 14)  # of an Ethernet frame: without IP and TCP headers (timestamps), Ethernet
_UNAVAILABLE = 3  # the switch's exit status where the machine lacks what it needs
_GRACE_S = 10.0  # how long the other ranks may take to notice that one failed


class Unavailable(RuntimeError):
    """This machine, or this user, cannot have network namespaces with TAP devices; says what is missing."""


class Network:
    """``ranks`` namespaces around a running switch."""

    def __init__(self, program: Path, switch: subprocess.Popen[str], namespaces: Sequence[str]) -> None:
        self._switch = switch
        # Before a command that this process starts: runs it in the rank's namespace.
        self.prefix = [
            (str(program), "enter", str(os.getpid()), f"/proc/{switch.pid}/fd/{number}")
            for number in namespaces
        ]
        self.addresses = [f"10.213.0.{rank + 1}" for rank in range(len(namespaces))]

    @property
    def ranks(self) -> int:
        return len(self.prefix)

    def environment(self, rank: int) -> dict[str, str]:
        """What `fastattn.parallel.group.init` reads; torchrun cannot start ranks across namespaces."""
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": "29500",  # free: the namespace is new
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # else torch warns that no name server knows the other ranks
        }

    def start(
        self, rank: int, command: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Runs ``command`` as ``rank``, in this process's environment, `environment` and ``env``.

        It is killed when the thread that called ends.
        """
        return subprocess.Popen(
            [*self.prefix[rank], *command],
            env={**os.environ, **self.environment(rank), **(env or {})},
            start_new_session=True,
        )

    def run(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> int:
        """Runs ``command`` as every rank. Returns the first exit status that is not 0, or 0.

        When a rank fails, the others have 10 s to end by themselves.
        """
        processes = [self.start(rank, command, env) for rank in range(self.ranks)]
        try:
            end, status = float("inf"), 0
            while None in (codes := [p.poll() for p in processes]) and time.monotonic() < end:
                if not status and (status := next(filter(None, codes), 0)):
                    end = time.monotonic() + _GRACE_S
                time.sleep(0.05)
            return status or next(filter(None, codes), 0)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def cut(self, rank: int) -> None:
        """Loses all that ``rank`` sends or should receive from now on, without a sign to anyone."""
        assert self._switch.stdin is not None
        print("cut", rank, file=self._switch.stdin, flush=True)


@contextmanager
def network(ranks: int, link: Link, jitter_s: float = 0.0) -> Iterator[Network]:
    """A switch with cables of ``link`` to ``ranks`` namespaces; raises `Unavailable` where there can be none.

    ``link``: rate of each direction of each cable, and latency from rank to rank, one way. ``jitter_s``: each
    frame takes up to so much longer, evenly distributed, in order.
    """
    numbers = (str(ranks), repr(link.bytes_per_s), repr(link.latency_s), repr(jitter_s))
    program = _compiled()
    with subprocess.Popen(
        [program, *numbers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as switch:  # fmt: skip
        try:
            assert switch.stdout is not None
            namespaces = switch.stdout.readline().split()
            if len(namespaces) != ranks:
                said = switch.communicate()[1].strip()
                error = Unavailable if switch.returncode == _UNAVAILABLE else RuntimeError
                raise error(f"emulated network: {said}")
            yield Network(program, switch, namespaces)
        finally:
            switch.kill()


def _compiled() -> Path:
    """The switch's program, of this source and this compiler."""
    lacking = [
        *(() if os.geteuid() == 0 else ["root's rights"]),
        *(() if Path("/dev/net/tun").exists() else ["the device /dev/net/tun (module tun)"]),
    ]
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        lacking.append(f"the C++ compiler {compiler[0]!r} (or set CXX)")
    if lacking:
        raise Unavailable(f"emulated network: needs {', '.join(lacking)}")
    files = sorted(SOURCES.iterdir())
    command = [*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-pthread", str(SOURCES / "switch.cpp")]
    key = hashlib.sha256(b"\0".join([f.read_bytes() for f in files] + [c.encode() for c in command]))
    program = CACHE / key.hexdigest()[:16]
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # others may compile the same
            done = subprocess.run([*command, "-o", f"{folder}/switch"], check=False)
            if done.returncode:
                raise RuntimeError(f"emulated network: {shlex.join(command)} ended with {done.returncode}")
            Path(folder, "switch").rename(program)
    return program
