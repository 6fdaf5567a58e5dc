"""Emulated links between network namespaces on this machine: a check of them, or a program on them.

Without a command, measures each link against what was asked for, over TCP: round trips of one byte, and the
rate that arrives in a stream from rank 1 to rank 0, in both directions at once (the slower one), and between
rank 0 and all others (together). % is the share of what TCP can carry at most at that rate, after headers.

With a command, runs it as every rank, each in a namespace of its own, with RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT and GLOO_SOCKET_IFNAME set, and ends with its status:

  bench/links.py --link 100mbit/1ms --ranks 2 -- fastattn generate smollm2 --prompt Hello

Rate and latency hold for each direction of each rank's cable; bench/lib/switch/switch.cpp says how exactly.
Needs root, /dev/net/tun and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastattn.spec import Link
from lib import env
from lib.args import duration, link_name, links, positive
from lib.network import PAYLOAD, Unavailable, network
from lib.records import Record, write
from lib.table import Column, Table
from lib.timing import summarize

LINKS = "10gbit/50us,1gbit/200us,100mbit/1ms,50mbit/5ms"
PROBE = Path(__file__).resolve().parent / "lib" / "link_probe.py"
TABLE = Table(
    [
        Column("link", 14), Column("ranks", 5, "d"), Column("round trip us", 13, ".0f"),
        Column("least", 6, ".0f"), Column("median", 6, ".0f"), Column("rate Mb/s", 9, ".0f"),
        Column("one way", 8, ".1f"), Column("%", 3, ".0f"), Column("both ways", 9, ".1f"),
        Column("%", 3, ".0f"), Column("all to one", 10, ".1f"), Column("%", 3, ".0f"),
        Column("one to all", 10, ".1f"), Column("%", 3, ".0f"),
    ]
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- COMMAND ...]",
    )  # fmt: skip
    p.add_argument(
        "--link", type=links, default=links(LINKS), metavar="RATE/LATENCY,...",
        help=f"in kbit, mbit, gbit (per second) and us, ms, s (one way); default: {LINKS}",
    )  # fmt: skip
    p.add_argument("--ranks", type=positive, default=2, help="default: 2")
    p.add_argument("--jitter", type=duration, default=0.0, metavar="TIME", help="added at most; default: 0us")
    p.add_argument(
        "--seconds", type=float, default=1.0, help="for which each stream would fill the link; default: 1"
    )
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("command", nargs="*", help=argparse.SUPPRESS)
    return p


def probe(link: Link, ranks: int, jitter_s: float, seconds: float) -> dict[str, Any]:
    """What the ranks see of the link (lib/link_probe.py)."""
    with tempfile.TemporaryDirectory() as folder, network(ranks, link, jitter_s) as net:
        result, size = Path(folder) / "result.json", int(link.bytes_per_s * seconds)
        status = net.run([sys.executable, str(PROBE), str(result), str(size)])
        if status:
            sys.exit(f"bench/links.py: {link_name(link)}: a rank ended with status {status}")
        return dict(json.loads(result.read_text()))


def check(link: Link, ranks: int, jitter_s: float, seconds: float, facts: dict[str, Any]) -> list[Record]:
    """Measures one link, prints its row and returns its records."""
    seen = probe(link, ranks, jitter_s, seconds)
    trips, asked_us, asked_mbit = seen["round_trips_s"], 2e6 * link.latency_s, 8e-6 * link.bytes_per_s
    timing = summarize(trips)
    shared = {"bench": "links", "case": f"{link_name(link)} ranks={ranks}", "claim": "emulated", "env": facts}
    records = [
        Record.of(
            shared | {"spread": timing.spread}, "round trip", "us", 1e6 * timing.median,
            bound=("asked", asked_us),
        )
    ]  # fmt: skip
    cells: list[float] = []
    for metric in ("one_way", "both_ways", "all_to_one", "one_to_all"):
        mbit, most = 8e-6 * seen[metric], PAYLOAD * asked_mbit
        cells += [mbit, 100 * mbit / most]
        name = f"throughput {metric.replace('_', ' ')}"
        records.append(Record.of(shared | {"spread": 0.0}, name, "Mb/s", mbit, bound=("asked", most)))
    times = (asked_us, 1e6 * min(trips), 1e6 * timing.median)
    print(TABLE.row(link_name(link), ranks, *times, asked_mbit, *cells), flush=True)
    return records


def main() -> None:
    """Checks every link, or runs the command on the only one."""
    args = parser().parse_args()
    if args.ranks < 2:
        sys.exit(f"bench/links.py: --ranks {args.ranks}: expected at least 2")
    try:
        if args.command:
            if len(args.link) > 1:
                sys.exit("bench/links.py: --link: a command runs on one link, name it")
            with network(args.ranks, args.link[0], args.jitter) as net:
                sys.exit(net.run(args.command))
        facts = env.capture(1)
        print(f"{env.headline(facts)} | emulated links, jitter {1e6 * args.jitter:g} us\n{TABLE.header()}")
        records = [r for link in args.link for r in check(link, args.ranks, args.jitter, args.seconds, facts)]
    except Unavailable as reason:
        sys.exit(f"bench/links.py: {reason}")
    if args.json:
        write(args.json, records)


if __name__ == "__main__":
    main()
