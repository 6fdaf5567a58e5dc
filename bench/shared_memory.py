"""The sum of the ranks' partial results on one machine: through memory they share, and through gloo.

  ours   an all-reduce as the policy `exact` makes it, in us: to the end of the slowest rank
  gloo   torch.distributed's all_reduce of the same tensors, in turn
  floor  writing the partial result where others read it, and adding what they wrote: so many copies of the
         message as there are ranks, at the rate at which every rank copied a message from its caches

Calls follow each other without computing between them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from fastattn.collectives.exchange import all_gather, all_reduce, shares_memory
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.spec import TPGroup
from lib import env
from lib.args import DTYPES, sweep
from lib.records import Record, ratio, write
from lib.table import Column, Table

TABLE = Table(
    [
        Column("ranks", 5, "d"), Column("bytes", 9, "d"), Column("ours us", 8, ".1f"),
        Column("gloo us", 8, ".1f"), Column("ratio", 6, ".1f"), Column("floor us", 8, ".1f"),
        Column("% of it", 7, ".0f"),
    ]
)  # fmt: skip
CALLS = 20  # of one rival, before the next one's turn


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ranks", type=sweep, default=(2,), metavar="N,N", help="default: 2")
    p.add_argument("--bytes", type=sweep, default=(2304, 16384, 131072, 1179648), metavar="N,N")
    p.add_argument("--data_type", choices=tuple(DTYPES), default="fp32", help="default: fp32")
    p.add_argument("--rounds", type=int, default=30, help=f"of {CALLS} calls of each; default: 30")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--result", help=argparse.SUPPRESS)  # a rank, started by this program
    return p


def main() -> None:
    """Starts the ranks, then reports."""
    args = parser().parse_args()
    if args.result:
        run(args)
        return
    print(f"{env.headline(env.capture(1))} | {args.data_type}\n{TABLE.header()}", flush=True)
    records: list[Record] = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            command = [sys.executable, *launcher, __file__, *sys.argv[1:], "--result", str(result)]
            if subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode:
                sys.exit(f"bench/shared_memory.py: a rank of {ranks} failed")
            for row in json.loads(result.read_text()):
                records.append(record(args, ranks, row))
                print(line(ranks, row))
        if ranks > env.cores():
            print(f"{ranks} ranks on {env.cores()} cores: these times are not claimed")
    if args.json:
        write(args.json, records)


def run(args: argparse.Namespace) -> None:
    """One rank."""
    g = init()
    set_threads(g, 1)
    if not shares_memory(g):
        sys.exit(
            "bench/shared_memory.py: these ranks share no memory (FASTATTN_SHARED_MEMORY, fastattn info)"
        )
    rows = [measure(g, size, DTYPES[args.data_type], args.rounds) for size in args.bytes]
    if g.rank == 0:
        Path(args.result).write_text(json.dumps(rows))
    shutdown(g)


def measure(g: TPGroup, size: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Seconds of a call: of each rank the median over rounds, of these the slowest rank's."""
    x = torch.zeros(size // dtype.itemsize, dtype=dtype)
    other = torch.empty_like(x)
    rivals = {
        "ours": lambda: all_reduce(g, x, "bench").wait(),
        "gloo": lambda: dist.all_reduce(x, group=g.pg),
        "copy": lambda: other.copy_(x),
    }
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds + 1):
        for name, call in rivals.items():
            begin = perf_counter()
            for _ in range(CALLS):
                call()
            samples[name].append((perf_counter() - begin) / CALLS)
    mine = torch.tensor([median(taken[1:]) for taken in samples.values()], dtype=torch.float64)
    slowest = torch.stack(all_gather(g, mine, "samples")).amax(0).tolist()
    return {"bytes": x.nbytes, **dict(zip(rivals, slowest, strict=True))}


def line(ranks: int, row: dict[str, float]) -> str:
    """Of the table."""
    ours, gloo, floor = (1e6 * t for t in (row["ours"], row["gloo"], ranks * row["copy"]))
    return TABLE.row(ranks, int(row["bytes"]), ours, gloo, gloo / ours, floor, 100 * floor / ours)


def record(args: argparse.Namespace, ranks: int, row: dict[str, float]) -> Record:
    """Of docs/benchmarks.md."""
    shared: dict[str, Any] = {
        "bench": "shared_memory",
        "case": f"ranks={ranks} bytes={int(row['bytes'])} {args.data_type}",
        "spread": 0.0,
        "claim": "measured" if ranks <= env.cores() else "emulated",
        "env": env.capture(1),
    }
    ours, gloo, floor = (1e6 * t for t in (row["ours"], row["gloo"], ranks * row["copy"]))
    against = ("gloo all_reduce", gloo, ratio(ours, gloo, higher_is_better=False))
    return Record.of(shared, "time", "us", ours, against, (f"{ranks} copies", floor))


if __name__ == "__main__":
    main()
