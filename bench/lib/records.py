"""The records that --json writes: one a metric of a case (docs/benchmarks.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastattn import dispatch
from fastattn.settings import settings

CLAIMS = ("measured", "compiled", "emulated", "modelled")


def claim() -> str:
    """Of a time in this process: "emulated" once a backend has run that FASTATTN_EMULATE names."""
    return "emulated" if settings.emulate & {backend for backend, _ in dispatch.calls} else "measured"


@dataclass(frozen=True)
class Record:
    """One number, what it is compared with, and what bounds it. ``ratio`` > 1: ours is better."""

    bench: str
    case: str
    metric: str
    unit: str
    ours: float
    peer: str
    peer_value: float | None
    ratio: float | None
    limit: str
    limit_value: float | None
    spread: float
    claim: str
    env: Mapping[str, str | int]

    def __post_init__(self) -> None:
        if self.claim not in CLAIMS:
            raise ValueError(f"claim: {self.claim!r}, expected {', '.join(CLAIMS)}")

    @classmethod
    def of(
        cls,
        shared: Mapping[str, Any],
        metric: str,
        unit: str,
        ours: float,
        against: tuple[str, float | None, float | None] = ("", None, None),
        bound: tuple[str, float | None] = ("", None),
    ) -> Record:
        """A record from the fields ``shared`` by a case (bench, case, spread, claim, env) and its own:
        ``against`` is (peer, peer_value, ratio), ``bound`` is (limit, limit_value).
        """
        return cls(
            shared["bench"], shared["case"], metric, unit, ours, *against, *bound, shared["spread"],
            shared["claim"], shared["env"],
        )  # fmt: skip


def ratio(ours: float, peer: float | None, higher_is_better: bool) -> float | None:
    """How many times better ours is; None without a peer."""
    if not peer or not ours:
        return None
    return ours / peer if higher_is_better else peer / ours


def write(path: str | Path, records: Sequence[Record]) -> None:
    """Writes the records as a JSON list."""
    Path(path).write_text(json.dumps([asdict(r) for r in records], indent=1) + "\n")


def append(path: str | Path, records: Sequence[Record]) -> list[Record]:
    """Adds the records to those of a file, if there is one, in the place of what it has of the same metrics
    of the same cases; returns all. So a sweep may be measured in parts.
    """
    new = {(r.bench, r.case, r.metric) for r in records}
    held = [Record(**fields) for fields in json.loads(Path(path).read_text())] if Path(path).exists() else []
    merged = [*(r for r in held if (r.bench, r.case, r.metric) not in new), *records]
    write(path, merged)
    return merged
