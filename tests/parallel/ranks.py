"""Ranks as plain subprocesses, each its own launcher, so that nobody cleans up after a dead one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Ranks:
    """``world`` processes of one program; their output goes to files in ``folder``."""

    def __init__(
        self,
        program: Path,
        arguments: Sequence[str],
        world: int,
        folder: Path,
        *,
        start: Sequence[int] | None = None,
        env: Mapping[str, str] | None = None,
        per_rank: Sequence[Mapping[str, str]] = (),
        prefix: Sequence[Sequence[str]] = (),
        address: str = "127.0.0.1",
    ) -> None:
        self.folder, self.world, self.processes = folder, world, {}
        inherited = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"}
        port = free_port()
        for rank in range(world) if start is None else start:
            own = {
                **inherited,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(port),
                **(env or {}),
                **(per_rank[rank] if per_rank else {}),
            }
            command = [*(prefix[rank] if prefix else ()), sys.executable, str(program), *arguments]
            with self._file(rank, "out").open("wb") as out, self._file(rank, "err").open("wb") as err:
                process = subprocess.Popen(
                    command, env={k: v for k, v in own.items() if v}, stdout=out, stderr=err, cwd=folder
                )
            self.processes[rank] = process

    def _file(self, rank: int, kind: str) -> Path:
        return self.folder / f"{kind}{rank}"

    def out(self, rank: int) -> str:
        return self._file(rank, "out").read_text()

    def err(self, rank: int) -> str:
        return self._file(rank, "err").read_text()

    def everything(self) -> str:
        return "\n".join(f"--- rank {r}\n{self.out(r)}{self.err(r)}" for r in self.processes)

    def until(self, text: str, seconds: float = 60) -> None:
        """Returns when every rank has printed ``text``."""
        end = time.monotonic() + seconds
        while not all(text in self.out(r) for r in self.processes):
            dead = [r for r, p in self.processes.items() if p.poll() is not None]
            assert not dead, f"ranks {dead} ended early\n{self.everything()}"
            assert time.monotonic() < end, f"no {text!r} within {seconds} s\n{self.everything()}"
            time.sleep(0.02)

    def release(self) -> None:
        """Lets ranks that wait for the file "start" begin, all at once."""
        self.until("loaded")
        (self.folder / "start").touch()

    def send(self, rank: int, number: signal.Signals) -> None:
        self.processes[rank].send_signal(number)

    def kill(self, victim: int) -> list[int]:
        """Kills a rank. The others end with an error within 5 s: returns them."""
        self.send(victim, signal.SIGKILL)
        codes = self.wait(5)
        assert codes.pop(victim) == -signal.SIGKILL
        assert set(codes.values()) == {1}, self.everything()
        for rank in codes:
            assert f"fastattn: error: rank {rank}: " in self.err(rank), self.everything()
        return list(codes)

    def wait(self, seconds: float, ranks: Sequence[int] | None = None) -> dict[int, int]:
        """Exit status of each rank; fails when one still runs after ``seconds``, all together."""
        end = time.monotonic() + seconds
        codes = {}
        for rank in self.processes if ranks is None else ranks:
            with suppress(subprocess.TimeoutExpired):
                codes[rank] = self.processes[rank].wait(max(0.0, end - time.monotonic()))
            assert rank in codes, f"rank {rank} still runs after {seconds} s\n{self.everything()}"
        return codes

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()
