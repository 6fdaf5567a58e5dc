"""Every way to sum the ranks' partial results, against gloo's all_reduce, over emulated links.

For each link and number of ranks, and for messages of 4 KB up to what the link carries in --seconds, one row
a policy (names as in fastattn generate --sync):

  time    from the moment when all ranks have their partial results to the end of the slowest rank: their sum,
          the residual's addition and the norm
  ratio   the time of gloo's all_reduce, followed by the same, over it (above 1: ours is faster)
  model   the policy's own prediction, from the link and the codec as the ranks measure them first
  wire    the time that the link needs for one hop and the bytes that the busiest rank sends
  chosen  the least modelled time; fastest is the least measured one

All take turns in one run. tiled has nothing to compute while
it waits here: it shows what splitting costs. The ranks are processes on this machine, each in a network
namespace of its own (bench/links.py checks those links); with more ranks than cores only times that the link
dominates mean anything.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from fastattn.spec import Link
from lib import env
from lib.args import DTYPES, link_name, links, policy, positive, several, sweep
from lib.collectives_worker import PEER, TABLE, Row, choice, run
from lib.launch import as_ranks
from lib.records import Record, append, write

LINKS = "10gbit/50us,1gbit/200us,100mbit/1ms,50mbit/5ms"
POLICIES = (
    "exact",
    "direct",
    "star",
    "tiled",
    "fused_norm",
    "compressed",
    "compressed:element=int8,scale=fp16",
)
LEAST = 4 << 10
MOST = 64 << 20  # a link of 10 Gb/s would carry more than memory takes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--link", type=links, default=links(LINKS), metavar="RATE/LATENCY,...", help=f"default: {LINKS}"
    )
    p.add_argument("--ranks", type=several, default=(2,), metavar="N,N", help="default: 2")
    p.add_argument(
        "--policy",
        nargs="+",
        type=policy,
        default=POLICIES,
        metavar="P",
        help=f"default: {' '.join(POLICIES)}",
    )  # fmt: skip
    p.add_argument("--bytes", type=sweep, metavar="N,N", help="sizes, instead of those of --seconds")
    p.add_argument(
        "--seconds", type=float, default=0.05, help="of the link's time, largest size; default: 0.05"
    )
    p.add_argument(
        "--data_type", choices=tuple(DTYPES), default="bf16", help="of the partial results; default: bf16"
    )
    p.add_argument("--budget", type=float, default=1.0, help="seconds spent on each size; default: 1")
    p.add_argument("--threads", type=positive, default=1, help="of each rank; default: 1")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--append", action="store_true", help="keep what --json FILE has of other cases")
    p.add_argument("--plot", metavar="FILE.png", help="draw time over size, a panel each link")
    p.add_argument("--result", help=argparse.SUPPRESS)  # a rank, started by this program
    return p


def sizes(link: Link, seconds: float) -> tuple[int, ...]:
    """Powers of 8 times 4 KB, and the largest; at most 64 MB."""
    most = min(int(link.bytes_per_s * seconds), MOST) // LEAST * LEAST
    powers = [LEAST * 8**i for i in range(8)]
    return (*(size for size in powers if size < most / 2), max(most, LEAST))


def main() -> None:
    """Runs each link with each number of ranks in a network of its own, then reports."""
    args = parser().parse_args()
    if args.result:
        run(args)
        return
    print(f"{env.headline(env.capture(args.threads))} | {args.threads} threads a rank, {args.data_type}")
    records: list[Record] = []
    for link, ranks in product(args.link, args.ranks):
        records += measure(args, link, ranks)
    if args.json and args.append:
        records = append(args.json, records)
    elif args.json:
        write(args.json, records)
    if args.plot:
        from lib.plot import collectives

        collectives(records, args.plot)


def measure(args: argparse.Namespace, link: Link, ranks: int) -> list[Record]:
    """One block of the table and its records."""
    print(f"\n{link_name(link)}, {ranks} ranks\n{TABLE.header()}", flush=True)
    listed = ",".join(map(str, args.bytes or sizes(link, args.seconds)))
    own = ("--link", link_name(link), "--bytes", listed)
    found = as_ranks(__file__, own, ranks, link, link_name(link))
    cores = env.cores()
    if ranks * args.threads > cores:
        print(
            f"{ranks} ranks on {cores} cores: of these times, only those that the link dominates are claimed"
        )
    return to_records(f"{link_name(link)} ranks={ranks} {args.data_type}", found)


def to_records(case: str, found: dict[str, Any]) -> list[Record]:
    """Time and prediction of each row; of each size, how far the choice by the model is from the fastest."""
    rows = [Row(**row) for row in found["rows"]]
    records = []
    for size in sorted({row.bytes for row in rows}):
        same = [row for row in rows if row.bytes == size]
        peer = next(row for row in same if row.policy == PEER)
        shared = {
            "bench": "collectives",
            "case": f"{case} bytes={size}",
            "claim": "emulated",
            "env": found["env"],
        }
        chosen, fastest = choice(same)
        for row in same:
            if row.model_ms is None:
                continue
            own = shared | {"case": f"{case} policy={row.policy} bytes={size}", "spread": row.spread}
            against = (PEER, peer.ms, peer.ms / row.ms)
            records.append(Record.of(own, "time", "ms", row.ms, against, ("wire", row.wire_ms)))
            own = own | {"claim": "modelled"}
            records.append(Record.of(own, "modelled time", "ms", row.model_ms, ("measured", row.ms, None)))
        off = shared | {"spread": chosen.spread}
        records.append(Record.of(off, "choice by the model over the fastest", "x", chosen.ms / fastest.ms))
    return records


if __name__ == "__main__":
    main()
