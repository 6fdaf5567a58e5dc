"""Attention against torch's scaled_dot_product_attention, with this machine's limits beside.

  decode    one query a sequence over a long KV cache. The limit is the roofline of the row: its bytes at the
            read bandwidth or its FLOP at the fp32 GEMM rate, whichever takes longer (bf16 dot products can
            beat the latter). Calls cycle through caches of 8 times the last-level cache, so that nothing is
            read twice from it.
  prefill   causal self-attention: bound by the GEMM rate of its data type (fp16: of fp32). Only the pairs of
            query and key that are visible count.

Peers: "enable_gqa" is what models call today; "folded" views the query heads of a KV head as rows of one
matrix, which is several times faster for decode; where torch lacks a feature, pages are "gathered" first and
packed sequences computed one after another ("each"). On a GPU (--device cuda) they are torch's flash and
cuDNN kernels where torch has them for the call, times are the stream's, the caches are the L2, and the
bandwidth is that of a copy. Calls of all rivals and of both limits alternate; medians are shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from lib import env
from lib.args import DTYPES, names, positive
from lib.attention_cases import Case, Qkv, has_kernel, operands, rivals, suite
from lib.limits import Work, gemm, reading
from lib.records import Record, claim, ratio, write
from lib.table import Column, Table
from lib.timing import Timing, time_calls


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--suite", choices=("quick", "full", "gpu"), default="quick", help="default: quick")
    p.add_argument("--data_type", type=names(tuple(DTYPES)), default=tuple(DTYPES), metavar="T,T")
    p.add_argument("--only", default="", metavar="TEXT", help='cases whose name has TEXT, as "decode bf16"')
    p.add_argument("--shorten", type=positive, default=1, metavar="N", help="divides the numbers of keys")
    p.add_argument("--seconds", type=float, default=2.0, help="spent on each row; default: 2")
    p.add_argument("--threads", type=positive, default=env.cores(), help="default: all cores")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--plot", metavar="FILE.png", help="draw the rates over the number of keys")
    return p


def measure(case: Case, limits: dict[str, Work], seconds: float) -> dict[str, Timing]:
    """Checks that the rivals agree, then times them and the limits in turn, each on the next operands."""
    sets, named = operands(case), rivals(case)
    named = {name: rival for name, rival in named.items() if has_kernel(rival, sets[0])}
    if not case.window:  # the rival of a window does not compute the same
        expected = named["fastattn"](*sets[0])
        for name, rival in named.items():
            got = rival(*sets[0])
            torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02, msg=f"{name} differs")
    turn: Iterator[Qkv] = cycle(sets)

    def on_next(rival: Callable[..., object]) -> Callable[[], object]:
        return lambda: rival(*next(turn))

    calls = {name: on_next(rival) for name, rival in named.items()}
    return time_calls(calls | {name: work.call for name, work in limits.items()}, seconds)


def bound(case: Case, limits: dict[str, float]) -> tuple[str, float]:
    """What binds the case, and the seconds that it takes at least."""
    if not case.decode:
        return f"{case.dtype} GEMM", case.flop() / limits["GEMM"]
    read, compute = case.kv_bytes() / limits["read"], case.flop() / limits["GEMM"]
    rate = case.dtype if env.on_gpu() else "fp32"
    return ("memory bandwidth", read) if read >= compute else (f"{rate} GEMM", compute)


def run(case: Case, reader: Work, seconds: float, table: Table, facts: dict[str, str | int]) -> list[Record]:
    """Measures one case, prints a row for each peer and returns their records."""
    works = {"GEMM": gemm(torch.float32 if case.decode and not env.on_gpu() else DTYPES[case.dtype])}
    if case.decode:
        works["read"] = reader
    timings = measure(case, works, seconds)
    limit, least = bound(case, {name: w.amount / timings.pop(name).median for name, w in works.items()})
    mine = timings.pop("fastattn")
    metric, unit = ("bandwidth", "GB/s") if case.decode else ("rate", "GFLOP/s")
    work = (case.kv_bytes() if case.decode else case.flop()) / 1e9
    shared: dict[str, Any] = {
        "bench": "attention",
        "case": case.name,
        "spread": mine.spread,
        "claim": claim(),
        "env": facts,
    }
    records = []
    for peer, theirs in timings.items():
        # By time: a peer without the window does more work in it.
        gain = ratio(mine.median, theirs.median, higher_is_better=False)
        against = (peer, work / theirs.median, gain)
        records.append(Record.of(shared, metric, unit, work / mine.median, against, (limit, work / least)))
        cells = (1e3 * mine.median, peer, 1e3 * theirs.median, gain, work / mine.median, work / least, unit)
        print(table.row(case.name, *cells, limit, 100 * least / mine.median), flush=True)
    return records


@torch.inference_mode()
def main() -> None:
    """Measures every case that was asked for."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    env.use_device(args.device)
    facts = env.capture(args.threads)
    print(f"{env.headline(facts)} | {args.threads} threads")
    table = Table(
        [
            Column("case", 48), Column("ours ms", 9, ".3f"), Column("peer", 19), Column("peer ms", 9, ".3f"),
            Column("ratio", 6, ".2f"), Column("rate", 7, ".1f"), Column("limit", 7, ".1f"), Column("unit", 7),
            Column("bound by", 16), Column("% of it", 7, ".0f"),
        ]
    )  # fmt: skip
    print(table.header(), flush=True)
    reader = reading()
    records: list[Record] = []
    for case in suite(args.suite):
        if case.dtype in args.data_type and args.only in case.name:
            short = replace(case, keys=max(1, case.keys // args.shorten))
            records += run(short, reader, args.seconds, table, facts)
    if args.json:
        write(args.json, records)
    if args.plot:
        from lib.plot import attention

        attention(records, args.plot)


if __name__ == "__main__":
    main()
