"""What a launch did: counts that the emulator took, per source line and in all."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cuda_volta.variant import Variant

ACCESSES = ("shared load", "shared store", "global load", "global store", "atomic")
SECTOR_BYTES = 32


class Line(NamedTuple):
    """The warp-wide requests of one source line of one kind."""

    file: str
    line: int
    access: str  # one of ACCESSES
    requests: int
    bytes: int  # that the lanes asked for
    wavefronts: int  # shared: passes through the 32 banks
    ideal: int  # shared: passes without conflicts
    sectors: int  # global: 32-byte pieces touched

    @property
    def conflicts(self) -> int:
        """Wavefronts that bank conflicts cost."""
        return self.wavefronts - self.ideal


class Report(NamedTuple):
    """One launch of one kernel."""

    variant: Variant
    grid: tuple[int, int, int]
    lines: tuple[Line, ...]
    mma: int  # warp instructions, as are the next four
    shuffles: int
    votes: int
    warp_barriers: int
    block_barriers: int  # counted once a warp

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond the ideal, in all."""
        return sum(line.conflicts for line in self.lines)

    def wavefronts(self, access: str) -> int:
        return sum(line.wavefronts for line in self.lines if line.access == access)

    def global_bytes(self, access: str = "global load") -> int:
        """Bytes of the sectors moved: what memory delivers if no cache holds them."""
        return SECTOR_BYTES * sum(line.sectors for line in self.lines if line.access == access)

    def __str__(self) -> str:
        head = f"{self.variant.name} grid {self.grid}: {self.mma} mma, {self.shuffles} shuffles, "
        head += f"{self.block_barriers} barriers of warps, {self.bank_conflicts} conflict wavefronts"
        columns = "{:<28} {:<12} {:>10} {:>12} {:>11} {:>9} {:>9}"
        table = [columns.format("line", "access", "requests", "bytes", "wavefronts", "conflicts", "sectors")]
        for line in self.lines:
            numbers = (line.requests, line.bytes, line.wavefronts, line.conflicts, line.sectors)
            table.append(columns.format(f"{line.file}:{line.line}", line.access, *numbers))
        return "\n".join([head, *table])


class LineCounts(ctypes.Structure):
    """``LineCounts`` of requests.hpp."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_uint32),
        ("access", ctypes.c_uint32),
        ("requests", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64),
        ("ideal", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
    ]

    def read(self) -> Line:
        return Line(
            Path(self.file.decode()).name,
            self.line,
            ACCESSES[self.access],
            self.requests,
            self.bytes,
            self.wavefronts,
            self.ideal,
            self.sectors,
        )


class WarpCounts(ctypes.Structure):
    """``WarpCounts`` of machine.hpp."""

    _fields_ = [
        (name, ctypes.c_uint64) for name in ("mma", "shuffles", "votes", "warp_barriers", "block_barriers")
    ]


_recorders: list[list[Report]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Report]]:
    """Collects a report of every emulated launch of this process while the context is open."""
    reports: list[Report] = []
    _recorders.append(reports)
    try:
        yield reports
    finally:
        _recorders[:] = [other for other in _recorders if other is not reports]


def recording() -> bool:
    return bool(_recorders)


def publish(report: Report) -> None:
    for reports in _recorders:
        reports.append(report)
