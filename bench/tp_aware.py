"""TP-aware dequantization (2402.04925): a pair of act-order GPTQ layers on 1, 2 and 4 ranks.

A column-parallel GEMM and the row-parallel one behind it, 4 bits in groups of 128, in the three layouts of
`fastattn.parallel.act_order`, with the same kernels and in turn in the same run:

  tp-aware    Algorithm 3: nothing between the GEMMs, one all-reduce behind them
  naive       Algorithm 2: AllGather and permutation between them. Permutation and cut are one step here,
              which moves 1 / N of what the paper's two move.
  local sort  no exchange either, but a permutation, and every rank holds the scales of all groups

  saved       (naive - tp-aware) over the AllGather's and the permutation's own times, measured alone
  bound       (tp-aware + AllGather + permutation) / tp-aware: the ratio if all of both is saved
  metadata    bytes of scales, zeros and orders of the second weight on rank 0, tp-aware over local sort

Times run from a common moment to the end of the slowest rank; medians. The ranks are processes of this
machine; with --link each lives in a network namespace behind an emulated cable (bench/links.py checks those).
With more ranks than cores only times that the link dominates mean anything.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from fastattn.spec import Link
from lib import env
from lib.args import DTYPES, link_name, links, positive, sweep
from lib.launch import as_ranks
from lib.records import Record, write
from lib.table import Column, Table
from lib.tp_pair import GATHER, PERMUTE, Pair, Row, run

SHAPES = {"llama-70b": Pair(8192, 28672, 8192), "granite-20b": Pair(6144, 24576, 6144)}
TABLE = Table(
    [
        Column("rows", 4, "d"), Column("tp-aware ms", 8, ".3f"), Column("naive ms", 8, ".3f"),
        Column("local ms", 8, ".3f"), Column("gather ms", 8, ".3f"), Column("permute ms", 8, ".3f"),
        Column("x naive", 6, ".2f"), Column("bound", 6, ".2f"), Column("saved %", 6, ".0f"),
        Column("x local", 6, ".2f"), Column("metadata", 8, ".3f"), Column("spread", 6, ".2f"),
    ]
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", type=shapes, default=tuple(SHAPES.values()), metavar="S,S",
                   help=f"out of {', '.join(SHAPES)}, or K1xN1xN2; default: both")  # fmt: skip
    p.add_argument("--rows", type=sweep, default=(1, 2, 4, 8, 16), metavar="M,M", help="default: 1,2,4,8,16")
    p.add_argument("--ranks", type=sweep, default=(1, 2, 4), metavar="N,N", help="default: 1,2,4")
    p.add_argument("--link", type=links, default=(None,), metavar="RATE/LATENCY,...",
                   help="between ranks; default: this machine's memory")  # fmt: skip
    p.add_argument("--data_type", choices=tuple(DTYPES), default="bf16", help="of x; default: bf16")
    p.add_argument("--budget", type=float, default=3.0, help="seconds spent on each row; default: 3")
    p.add_argument("--threads", type=positive, default=1, help="of each rank; default: 1")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--one", help=argparse.SUPPRESS)  # the shape of a rank that this program started
    p.add_argument("--result", help=argparse.SUPPRESS)
    return p


def shapes(text: str) -> tuple[Pair, ...]:
    """ "llama-70b,512x1024x512"; sizes are multiples of 128."""
    found = []
    for item in text.split(","):
        sizes = SHAPES.get(item) or tuple(positive(n) for n in item.split("x"))
        if len(sizes) != 3 or any(n % 128 for n in sizes):
            accepted = f"{', '.join(SHAPES)} or K1xN1xN2 of multiples of 128"
            raise argparse.ArgumentTypeError(f"{item!r}, expected {accepted}")
        found.append(Pair(*sizes))
    return tuple(found)


def main() -> None:
    """Runs each shape on each number of ranks and reports."""
    args = parser().parse_args()
    if args.result:
        run(args)
        return
    facts = env.capture(args.threads)
    print(f"{env.headline(facts)} | {args.threads} threads a rank, x {args.data_type}")
    records: list[Record] = []
    for link, pair, ranks in product(args.link, args.shape, args.ranks):
        records += measure(args, link, pair, ranks, facts)
    if args.json:
        write(args.json, records)


def measure(
    args: argparse.Namespace, link: Link | None, pair: Pair, ranks: int, facts: dict[str, str | int]
) -> list[Record]:
    """One block of the table and its records."""
    where = f"{'x'.join(map(str, pair))} ranks={ranks} {link_name(link) if link else 'local'}"
    print(f"\n{where}\n{TABLE.header()}", flush=True)
    own = ("--one", "x".join(map(str, pair)))
    records = []
    for row in as_ranks(__file__, own, ranks, link, where, {"OMP_NUM_THREADS": "1"}):
        records += report(Row(**row), where, "emulated" if link else "measured", facts)
    if ranks * args.threads > env.cores():
        print(f"{ranks} ranks on {env.cores()} cores: only times that the link dominates are claimed")
    return records


def report(row: Row, where: str, claim: str, facts: dict[str, str | int]) -> list[Record]:
    """Prints the line of one number of rows; its records."""
    ours, naive, local = (row.ms[name] for name in ("tp_aware", "naive", "local_sort"))
    gather, permute = row.ms[GATHER], row.ms[PERMUTE]
    steps = gather + permute
    metadata = row.metadata["tp_aware"] / row.metadata["local_sort"]
    saved, bound = (naive - ours) / steps, (ours + steps) / ours
    print(
        TABLE.row(
            row.rows, ours, naive, local, gather, permute, naive / ours, bound, 100 * saved, local / ours,
            metadata, row.spread["tp_aware"],
        ),
        flush=True,
    )  # fmt: skip
    shared: dict[str, Any] = {
        "bench": "tp_aware", "case": f"{where} rows={row.rows}", "spread": row.spread["tp_aware"],
        "claim": claim, "env": facts,
    }  # fmt: skip
    least = ("time without AllGather and permutation", naive - steps)
    return [
        Record.of(shared, "time", "ms", ours, ("naive", naive, naive / ours), least),
        Record.of(shared, "time", "ms", ours, ("local sort", local, local / ours)),
        Record.of(shared, "saved of gather and permutation", "", saved, ("their own ms", steps, None)),
        Record.of(
            shared, "scales, zeros and orders of W2", "bytes", row.metadata["tp_aware"],
            ("local sort", row.metadata["local_sort"], 1 / metadata),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
