"""Ops that only move memory: RMSNorm with its residual, SwiGLU and MX formats, against the bandwidth.

Calls cycle through operands of 8 times the last-level cache; an op's bytes are those that it must read and
write once. The limit is a copy of the same run on a GPU, reading on a CPU. Peers are torch's own operators,
one after the other, where torch has them. All alternate; medians are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import ops
from fastattn.quant import mx
from lib import env
from lib.args import DTYPES, names, positive
from lib.limits import Work, reading
from lib.records import Record, claim, ratio, write
from lib.table import Column, Table
from lib.timing import Timing, time_calls

Facts = dict[str, str | int]


class Case(NamedTuple):
    """One op on one shape; ``run`` and ``peer`` take one set of operands."""

    name: str
    nbytes: int  # read and written, of one set
    make: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., object]
    peer: Callable[..., object] | None


def cases(rows: int, hidden: int, dtype: torch.dtype) -> Iterator[Case]:
    """The rows of the table."""
    size, weight = rows * hidden * dtype.itemsize, torch.ones(hidden).to(dtype)

    def tensors(count: int, width: int) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: tuple(torch.randn(rows, width).to(dtype) for _ in range(count))

    def torch_norm(x: Tensor, residual: Tensor) -> Tensor:
        return F.rms_norm(x + residual, (hidden,), weight, 1e-5)

    def torch_gate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def packed_values(element: str) -> tuple[Tensor, ...]:
        return ops.mx_pack(torch.randn(rows, hidden).to(dtype), element)

    yield Case(
        "rms_norm + residual", 4 * size, tensors(2, hidden),
        lambda x, r: ops.rms_norm(x, weight, 1e-5, r), torch_norm,
    )  # fmt: skip
    yield Case("swiglu", 3 * size, tensors(1, 2 * hidden), ops.swiglu, torch_gate)
    for element in ("e2m1", "e4m3"):
        packed = rows * (mx.code_bytes(hidden, element) + mx.scale_bytes(hidden, 32, "floor"))
        yield Case(
            f"mx_pack {element}", size + packed, tensors(1, hidden),
            lambda x, element=element: ops.mx_pack(x, element), None,
        )  # fmt: skip
        yield Case(
            f"mx_unpack {element}", size + packed,
            partial(packed_values, element),
            lambda codes, scales, element=element: ops.mx_unpack(codes, scales, element, hidden, dtype=dtype),
            None,
        )  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--rows", type=positive, default=4096, help="of x; default: 4096")
    p.add_argument("--hidden", type=positive, default=8192, help="columns of x; default: 8192")
    p.add_argument("--data_type", type=names(tuple(DTYPES)), default=("fp16",), metavar="T,T")
    p.add_argument("--seconds", type=float, default=1.0, help="spent on each row; default: 1")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    return p


def measure(case: Case, limit: Work, seconds: float) -> dict[str, Timing]:
    """Times the op, its peer and the limit in turn, each on the next operands."""
    sets = [case.make() for _ in range(-(-8 * env.last_level_cache() // case.nbytes))]
    turn = cycle(sets)
    calls: dict[str, Callable[[], object]] = {"fastattn": lambda: case.run(*next(turn))}
    if case.peer is not None:
        calls["torch"] = lambda peer=case.peer: peer(*next(turn))  # type: ignore[misc]
    return time_calls(calls | {"limit": limit.call}, seconds)


def row(case: Case, dtype: str, limit: Work, args: argparse.Namespace, table: Table, facts: Facts) -> Record:
    """Measures one op, prints its row and returns its record."""
    timings = measure(case, limit, args.seconds)
    mine, theirs = timings["fastattn"], timings.get("torch")
    rate, bandwidth = case.nbytes / mine.median / 1e9, limit.amount / timings["limit"].median / 1e9
    name = f"{case.name} {dtype} {args.rows}x{args.hidden}"
    shared: dict[str, Any] = {
        "bench": "small_ops", "case": name, "spread": mine.spread, "claim": claim(), "env": facts,
    }  # fmt: skip
    peer = None if theirs is None else case.nbytes / theirs.median / 1e9
    gain = ratio(rate, peer, higher_is_better=True)
    against = ("" if peer is None else "torch", peer, gain)
    print(table.row(name, 1e3 * mine.median, gain, rate, bandwidth, 100 * rate / bandwidth), flush=True)
    return Record.of(shared, "bandwidth", "GB/s", rate, against, ("memory bandwidth", bandwidth))


@torch.inference_mode()
def main() -> None:
    """Measures every op."""
    args = parser().parse_args()
    torch.set_num_threads(env.cores())
    env.use_device(args.device)
    facts = env.capture(env.cores())
    print(env.headline(facts))
    table = Table(
        [
            Column("case", 36), Column("ours ms", 8, ".3f"), Column("torch", 6, ".2f"),
            Column("GB/s", 8, ".1f"), Column("limit", 8, ".1f"), Column("% of it", 7, ".0f"),
        ]
    )  # fmt: skip
    print(table.header(), flush=True)
    limit = reading()
    records = [
        row(case, dtype, limit, args, table, facts)
        for dtype in args.data_type
        for case in cases(args.rows, args.hidden, DTYPES[dtype])
    ]
    if args.json:
        write(args.json, records)


if __name__ == "__main__":
    main()
