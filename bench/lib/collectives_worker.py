"""One rank of one link of bench/collectives.py: all policies at all sizes, in turn with all_reduce."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastattn.collectives.policy import finish
from fastattn.collectives.wire import Plain
from fastattn.ops import rms_norm
from fastattn.parallel import measure
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.parallel.plan import with_item_bytes
from fastattn.parallel.policies import parse
from fastattn.quant.packed import dense
from fastattn.spec import Epilogue, Link, Point, Rates, Stream, SyncPolicy, TPGroup

from . import env
from .args import DTYPES
from .meeting import Meeting
from .network import PAYLOAD
from .table import Column, Table
from .timing import interleave, summarize

HIDDEN = 512
PEER = "gloo all_reduce"
POINT = Point(0, "mlp", "prefill")
TIMEOUT_S = 120.0
ROUNDS = (5, 50)  # at least and at most
TABLE = Table(
    [
        Column("bytes", 9, "d"), Column("policy", 34), Column("time ms", 9, ".3f"),
        Column("spread", 6, ".2f"), Column("ratio", 5, ".2f"), Column("model ms", 9, ".3f"),
        Column("wire ms", 9, ".3f"), Column("% of it", 7, ".0f"), Column("", 15),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What one policy took for one size; the peer's row has no model."""

    policy: str
    bytes: int
    rounds: int
    ms: float
    spread: float
    model_ms: float | None
    wire_ms: float


class Model(NamedTuple):
    """A policy, and what its own prediction needs."""

    policy: SyncPolicy
    link: Link
    rates: Rates

    @classmethod
    def of(cls, policy: SyncPolicy, g: TPGroup, link: Link, dtype: torch.dtype) -> Model:
        """Measures what encoding and adding take; collective."""
        wire = getattr(getattr(policy, "of", policy), "wire", Plain(dtype.itemsize))
        value_s = measure.value_s(g, wire, 64, HIDDEN, dtype)
        return cls(policy, link, Rates(value_s=value_s, item_bytes=dtype.itemsize, world=g.world))

    def ms(self, rows: int) -> float:
        """The prediction."""
        return 1e3 * self.policy.seconds(rows, HIDDEN, self.link, self.rates)


class Given:
    """A `spec.Produce` whose ``x`` is there when all ranks begin: computing it has taken long enough for what
    a policy does before.
    """

    def __init__(self, x: Tensor, begin: Callable[[], None]) -> None:
        self.rows, self._x, self._begin = x.shape[0], x, begin
        self.row_parallel = dense(torch.zeros(x.shape[1], 1))

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        if lo == 0:
            self._begin()
        return self._x[lo:hi]

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        return self._x.new_zeros(hi - lo, 1)


class Problem:
    """A sync point: partial results of ``size`` bytes, to which residual and norm follow."""

    def __init__(self, g: TPGroup, meeting: Meeting, size: int, dtype: torch.dtype) -> None:
        self.group, self.meeting, self.rows = g, meeting, max(1, size // (HIDDEN * dtype.itemsize))
        generator = torch.Generator().manual_seed(g.rank)
        self.partial = torch.randn(self.rows, HIDDEN, generator=generator).to(dtype)
        self.scratch, self.residual = torch.empty_like(self.partial), torch.ones_like(self.partial)
        weight = torch.ones(HIDDEN, dtype=dtype)
        self.epilogue = Epilogue(None, lambda x, residual: rms_norm(x, weight, 1e-5, residual))

    def ours(self, policy: SyncPolicy) -> Tensor:
        self.scratch.copy_(self.partial)  # which a sum may overwrite
        make, stream = Given(self.scratch, self.meeting.begin), Stream(self.residual, None)
        out = policy.start(POINT, make, stream, self.epilogue, self.group).wait()
        assert out.hidden is not None
        return out.hidden

    def peer(self) -> Tensor:
        self.scratch.copy_(self.partial)
        self.meeting.begin()
        dist.all_reduce(self.scratch, group=self.group.pg)
        out = finish(self.scratch, self.residual, self.epilogue)
        assert out.hidden is not None
        return out.hidden

    def check(self, name: str, policy: SyncPolicy) -> None:
        """Ends the program when the policy's result is not the peer's."""
        expected = self.peer().double()
        apart = float((self.ours(policy).double() - expected).norm() / expected.norm())
        if not apart < (0.02 if policy.exact else 0.3):
            raise SystemExit(f"{name}, {self.rows} rows: {apart:.3g} of the norm off")


def run(args: argparse.Namespace) -> None:
    """Measures with the group that the launcher's environment describes."""
    g = init(timeout_s=TIMEOUT_S)
    set_threads(g, args.threads)
    (link,) = args.link
    dtype = DTYPES[args.data_type]
    policies = {text: with_item_bytes(parse(text)[0], dtype.itemsize) for text in args.policy}
    meeting = Meeting(g)
    rows = []
    with torch.inference_mode():
        measured_link = measure.link(g)
        if g.rank == 0:
            print(f"as the ranks measure it: {_described(measured_link)}", flush=True)
        models = {text: Model.of(p, g, measured_link, dtype) for text, p in policies.items()}
        for size in args.bytes:
            measured = _measure(Problem(g, meeting, size, dtype), models, link, args.budget)
            rows += measured
            if g.rank == 0:
                print("\n".join(lines(measured)), flush=True)
    if g.rank == 0:
        result = {"rows": [asdict(row) for row in rows], "env": env.capture(args.threads)}
        Path(args.result).write_text(json.dumps(result))
    shutdown(g)


def _measure(problem: Problem, models: dict[str, Model], link: Link, budget: float) -> list[Row]:
    size, meeting, world = problem.partial.nbytes, problem.meeting, problem.group.world
    for name, model in models.items():
        problem.check(name, model.policy)

    def ours(policy: SyncPolicy) -> Callable[[], float]:
        return meeting.timed(lambda: problem.ours(policy))

    runs = {PEER: meeting.timed(problem.peer), **{name: ours(m.policy) for name, m in models.items()}}
    begin = perf_counter()
    interleave(runs, 1, 0)
    rounds = meeting.same(int(min(max(budget / (perf_counter() - begin), ROUNDS[0]), ROUNDS[1])))
    rows = []
    for name, taken in interleave(runs, rounds, 0).items():
        timing = summarize(meeting.slowest(taken))
        predicted, sent = None, 2 * (world - 1) * size // world
        if name in models:
            predicted = models[name].ms(problem.rows)
            sent = models[name].policy.wire_bytes(problem.rows, HIDDEN, world)
        wire = link.latency_s + sent / (link.bytes_per_s * PAYLOAD)
        rows.append(Row(name, size, rounds, 1e3 * timing.median, timing.spread, predicted, 1e3 * wire))
    return rows


def _described(link: Link) -> str:
    rate, hop, ring = 8e-6 * link.bytes_per_s, 1e3 * link.latency_s, 1e3 * (link.all_reduce_s or 0.0)
    return f"{rate:.1f} Mb/s, a hop {hop:.2f} ms, an empty all_reduce {ring:.2f} ms"


def choice(rows: list[Row]) -> tuple[Row, Row]:
    """The policy with the least modelled time, and the fastest."""
    ours = [row for row in rows if row.model_ms is not None]
    return min(ours, key=lambda row: row.model_ms or 0.0), min(ours, key=lambda row: row.ms)


def lines(rows: list[Row]) -> list[str]:
    """The table's lines of one size."""
    peer = next(row for row in rows if row.policy == PEER)
    chosen, fastest = choice(rows)
    found = []
    for row in rows:
        marks = ["chosen"] * (row is chosen) + ["fastest"] * (row is fastest)
        found.append(
            TABLE.row(
                row.bytes, row.policy, row.ms, row.spread, None if row is peer else peer.ms / row.ms,
                row.model_ms, row.wire_ms, 100 * row.wire_ms / row.ms, ", ".join(marks),
            )
        )  # fmt: skip
    return found
