"""What `fastattn plan` chooses, against every candidate measured, over emulated links.

For each link, number of ranks and --phase of a real model's first --layers layers (all are alike), exact sums
only. The planner chooses as the command does. Then all its candidates are measured, as often as --budget
allows, until they are clearly slower than the fastest; and then, because the least of many noisy medians is
too low, the fastest five, exact and the choice again, in turn:

  ms, exact ms, best ms   the choice, exact sums and the fastest candidate, in those last rounds
  x exact                 exact over the choice (never below 0.97)
  off best                the choice over the fastest (at most 1.10)
  model                   the fastest by the model alone, measured, over the fastest

The ranks are processes on this machine, each in a network namespace of its own (bench/links.py checks those
links); with more ranks than cores only times that the link dominates mean anything.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from fastattn.parallel.plan import PHASES
from fastattn.spec import Link
from lib import env
from lib.args import DTYPES, link_name, links, names, positive, several
from lib.launch import as_ranks
from lib.planner_worker import TABLE, run
from lib.records import Record, append, write

LINKS = "10gbit/50us,1gbit/200us,100mbit/1ms,50mbit/5ms"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", help="a directory, a GGUF file, or smollm2 (default)")
    p.add_argument("--layers", type=positive, default=2, help="of the model; default: 2")
    p.add_argument(
        "--link", type=links, default=links(LINKS), metavar="RATE/LATENCY,...", help=f"default: {LINKS}"
    )
    p.add_argument("--ranks", type=several, default=(2,), metavar="N,N", help="default: 2")
    p.add_argument(
        "--phase", type=names(PHASES), default=PHASES, metavar="P,P", help=f"default: {','.join(PHASES)}"
    )
    p.add_argument("--prefill_tokens", type=positive, default=256, help="default: 256")
    p.add_argument("--batch", type=positive, default=1, help="of decode; default: 1")
    p.add_argument(
        "--inference_data_type", choices=tuple(DTYPES), default="bf16", help="of activations; default: bf16"
    )
    p.add_argument(
        "--budget",
        type=float,
        default=3.0,
        help="seconds of the planner, a phase; four times that after it; default: 3",
    )
    p.add_argument("--threads", type=positive, default=1, help="of each rank; default: 1")
    p.add_argument("--verbose", action="store_true", help="show every candidate")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--append", action="store_true", help="keep what --json FILE has of other cases")
    p.add_argument("--result", help=argparse.SUPPRESS)  # a rank, started by this program
    return p


def main() -> None:
    """Runs each link with each number of ranks in a network of its own."""
    args = parser().parse_args()
    if args.result:
        run(args)
        return
    facts = env.capture(args.threads)
    size = f"{args.model}, {args.layers} layers, {args.inference_data_type}"
    print(f"{env.headline(facts)} | {args.threads} threads a rank | {size}\n{TABLE.header()}", flush=True)
    records: list[Record] = []
    for link, ranks in product(args.link, args.ranks):
        records += measure(args, link, ranks, facts)
    if max(args.ranks) * args.threads > env.cores():
        print(f"more ranks than the {env.cores()} cores: only times that the link dominates are claimed")
    if args.json:
        (append if args.append else write)(args.json, records)


def measure(args: argparse.Namespace, link: Link, ranks: int, facts: dict[str, Any]) -> list[Record]:
    """The rows of one network, which rank 0 prints, and their records."""
    records = []
    for row in as_ranks(__file__, ("--link", link_name(link)), ranks, link, link_name(link)):
        shared = {
            "bench": "planner", "case": f"{link_name(link)} ranks={ranks} {args.model} {row['phase']}",
            "spread": row["spread"], "claim": "emulated", "env": facts,
        }  # fmt: skip
        against = ("exact", row["exact_ms"], row["exact_ms"] / row["ms"])
        records.append(Record.of(shared, "time", "ms", row["ms"], against, (row["best"], row["best_ms"])))
        records.append(Record.of(shared, "choice over the fastest", "x", row["ms"] / row["best_ms"]))
    return records


if __name__ == "__main__":
    main()
