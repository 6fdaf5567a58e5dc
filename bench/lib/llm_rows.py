"""What one case of bench/llm.py gave, and its lines of the table: ours, then one for each peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .llm_peers import Sample
from .records import ratio
from .table import Column, Table
from .timing import summarize


@dataclass(frozen=True)
class Times:
    """Medians over the samples of a case."""

    latency_ms: float
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float

    @classmethod
    def of(cls, samples: Sequence[Sample], batch: int, output: int) -> Times:
        """TPOT is the time of a further token of the whole batch."""
        latency = summarize([s.latency_s for s in samples]).median
        ttft = summarize([s.ttft_s for s in samples]).median
        tpot = summarize([(s.latency_s - s.ttft_s) / max(1, output - 1) for s in samples]).median
        return cls(1e3 * latency, 1e3 * ttft, 1e3 * tpot, batch * output / latency)


@dataclass(frozen=True)
class Rival:
    """A peer's times, and how many of its greedy tokens equal ours before the first that differs."""

    times: Times
    same_tokens: int


@dataclass(frozen=True)
class Row:
    """One case of one configuration."""

    batch: int
    input: int
    output: int
    world: int
    dtype: str
    act: str
    threads: int
    times: Times
    spread: float  # of the latency
    peak_mb: list[float]  # of each rank
    ttft_limit_ms: float | None
    tpot_limit_ms: float
    peers: dict[str, Rival]
    sync: str  # how the ranks sum their partial results
    link: str  # between the ranks' namespaces; "" when they share one
    base: Times | None  # of the first sync, for the others
    limits: dict[str, str]  # which limit binds "TTFT" and "TPOT"


TABLE = Table(
    [
        Column("batch", 5, "d"),
        Column("in+out", 8),
        Column("TP", 2, "d"),
        Column("dtype", 5),
        Column("act", 4),
        Column("thr", 3, "d"),
        Column("system", 12),
        Column("latency ms", 10, ".1f"),
        Column("ratio", 5, ".2f"),
        Column("TTFT ms", 7, ".1f"),
        Column("ratio", 5, ".2f"),
        Column("limit", 6, ".1f"),
        Column("TPOT ms", 7, ".2f"),
        Column("ratio", 5, ".2f"),
        Column("limit", 5, ".2f"),
        Column("tok/s", 6, ".1f"),
        Column("peak MB", 7),
        Column("sync", 6),  # may be longer: it is the last
    ]
)


def lines(row: Row) -> str:
    """The row's lines of the table."""
    t = row.times
    peak = "+".join(f"{mb:.0f}" for mb in row.peak_mb)
    ratios: list[float | str | None] = ["", "", ""]
    if row.base:
        b = row.base
        ratios = [
            ratio(mine, first, False)
            for mine, first in ((t.latency_ms, b.latency_ms), (t.ttft_ms, b.ttft_ms), (t.tpot_ms, b.tpot_ms))
        ]
    text = [
        TABLE.row(
            row.batch, f"{row.input}+{row.output}", row.world, row.dtype, row.act, row.threads, "fastattn",
            t.latency_ms, ratios[0], t.ttft_ms, ratios[1], row.ttft_limit_ms, t.tpot_ms, ratios[2],
            row.tpot_limit_ms, t.tokens_per_s, peak, row.sync,
        )
    ]  # fmt: skip
    for name, rival in row.peers.items():
        p = rival.times
        text.append(
            TABLE.row(
                *[""] * 6, name, p.latency_ms, ratio(t.latency_ms, p.latency_ms, False), p.ttft_ms,
                ratio(t.ttft_ms, p.ttft_ms, False), "", p.tpot_ms, ratio(t.tpot_ms, p.tpot_ms, False), "",
                p.tokens_per_s, "", "",
            )
        )  # fmt: skip
    return "\n".join(text)


def same_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int:
    """Over the batch, the tokens before the first difference."""
    total = 0
    for a, b in zip(ours, theirs, strict=True):
        same = [x == y for x, y in zip(a, b, strict=True)]
        total += same.index(False) if False in same else len(same)
    return total


def served_by(served: Sequence[tuple[str, str, int]]) -> list[str]:
    """Which backend ran which ops, how often: a line a backend."""
    ops: dict[str, list[str]] = {}
    for backend, op, count in served:
        ops.setdefault(backend, []).append(f"{op} {count}")
    return [f"ops served by {backend}: {', '.join(counts)}" for backend, counts in ops.items()]


def notes(result: Mapping[str, Any], cores: int) -> list[str]:
    """Lines under a configuration's rows: memory, what the peers' tokens say, and what is not claimed."""
    rows = result["rows"]
    above = max(max(row["peak_mb"]) for row in rows) - result["torch_mb"]
    share = result["file_mb"] / rows[0]["world"]
    of_file = f"{above:.0f} MB, {above / share:.2f}x of a rank's share of the model file"
    beyond = f"above an interpreter with torch ({result['torch_mb']:.0f} MB)"
    if result["device"] != "cpu":
        beyond = f"of tensors on {result['device']}"
    found = [f"peak memory {beyond}: {of_file}", *served_by(result["served"])]
    if result["emulated"]:
        found.append(f"{', '.join(result['emulated'])} emulated: no time here is that of a device")
    for key, name in result["peers"].items():
        shared = [r for r in rows if key in r["peers"]]
        same = sum(r["peers"][key]["same_tokens"] for r in shared)
        found.append(
            f"{name}: {same} of {sum(r['batch'] * r['output'] for r in shared)} greedy tokens equal ours"
        )
    threads = rows[0]["world"] * rows[0]["threads"]
    if rows[0]["link"]:
        found.append(f"the ranks' link is emulated: {rows[0]['link']}")
    if threads > cores:
        found.append(f"{threads} threads on {cores} cores: these times are emulated, not claimed")
    return found
