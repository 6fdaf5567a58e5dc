"""How fast the Volta kernels can run, by two models of their machine code: without a GPU, nothing timed.

The pipe bound is the busiest pipe's cycles for 1000 multiply-adds (the tensor cores' own limit is 7.81); the
issue simulator gives a range of TFLOP/s, over machines that reproduce xformers' published speeds
(docs/volta.md), at 1.53 GHz and 8192 tokens, and what an instruction cache without misses would give.
TFLOP/s count attended query-key pairs: causal kernels are not credited for what they skip.

  bench/volta.py                                        our kernels
  bench/volta.py --peer                                 and xformers', fetched (213 MB) and simulated as well
  bench/volta.py --cubin FILE --kernel REGEX --macs M --warps W

Decode is judged by the bytes it moves, counted in the emulator, and by the rate at which the simulator's
memory delivers them; linear layers by the rate at which they read a weight's codes. Where a GPU is present,
the kernels' PTX is timed on it as well: that is not a V100.

The last command bounds the kernels of any cubin by their busiest pipe: M multiply-adds a block does for one
K/V tile (2 block_q block_k head_dim), W warps a block has.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cuda_volta.sass import listing, pipes
from cuda_volta.sass.simulate.calibration import CALIBRATED
from lib import env, volta_decode, volta_gpu, volta_linear, volta_peer
from lib.args import names, sweep
from lib.records import Record, write
from lib.table import Column, Table
from lib.volta_cases import CASES
from lib.volta_model import Figures, Static, figures, spread, static, work

DECODE = Table(
    [
        Column("D", 3, "d"), Column("bytes moved / KV", 16, ".4f"), Column("splits", 6, "d"),
        Column("GB/s", 9), Column("reachable", 9, ".0f"),
    ]
)  # fmt: skip
GPU = Table(
    [
        Column("case", 6), Column("D", 3, "d"), Column("ours ms", 8, ".3f"), Column("SDPA ms", 8, ".3f"),
        Column("difference", 10, ".1e"),
    ]
)  # fmt: skip
LINEAR = Table(
    [
        Column("bits", 4, "d"), Column("ranks", 5, "d"), Column("rows", 4, "d"),
        Column("instr/1000 weights", 18, ".1f"), Column("GB/s", 9), Column("no misses", 9, ".0f"),
        Column("reachable", 9, ".0f"),
    ]
)  # fmt: skip
TENSOR_LIMIT = 1000 * 2 / pipes.MACS_PER_STEP  # cycles of a sub-core for 1000 multiply-adds
PEAK = 125.0  # TFLOP/s at 1.53 GHz
TABLE = Table(
    [
        Column("kernel", 16), Column("D", 3, "d"), Column("cyc/kMAC", 8, ".2f"), Column("bound by", 8),
        Column("instr/HMMA", 10, ".2f"), Column("barriers", 8, ".1f"), Column("spills B", 8, "d"),
        Column("loop B", 6, "d"), Column("hot B", 6, "d"), Column("warps", 5, "d"), Column("TFLOP/s", 11),
        Column("no misses", 9, ".1f"), Column("published", 9, ".1f"),
    ]
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--head-dim", type=sweep, default=(64, 128, 256), metavar="D,...", help="default: 64,128,256"
    )
    known = [*(case.name for case in CASES), "decode", "linear"]
    p.add_argument("--case", type=names(known), default=tuple(known), metavar="NAME,...", help="default: all")
    p.add_argument("--peer", action="store_true", help="fetch xformers' kernels and model them as well")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--cubin", metavar="FILE", help="bound this cubin's kernels instead")
    p.add_argument("--kernel", metavar="REGEX", default="", help="on the mangled name; default: all kernels")
    p.add_argument("--macs", type=float, help="multiply-adds of a block for one K/V tile")
    p.add_argument("--warps", type=int, help="of a block")
    return p


def bound(cubin: str, kernel: str, macs: float, warps: int) -> None:
    """Prints the pipe bound of each matching kernel."""
    chosen = {name: f for name, f in listing.read(cubin).items() if re.search(kernel, name)}
    if not chosen:
        sys.exit(f"bench/volta.py: --kernel: {kernel!r} matches no kernel of {cubin}")
    for name, function in chosen.items():
        found = pipes.static_tally(function, macs / warps)
        print(f"{name}\n  registers {function.registers}")
        if found is None:
            print("  no loop holds HMMA")
            continue
        cycles = sorted(found.cycles.items(), key=lambda item: -item[1])
        print("  cycles per warp and tile: " + ", ".join(f"{k} {v:.0f}" for k, v in cycles))
        counts = sorted(found.counts.items(), key=lambda item: -item[1])
        print("  instructions: " + ", ".join(f"{k} {v:.0f}" for k, v in counts[:16]))
        share = found.cycles["tensor"] / found.cycles[found.busiest]
        print(
            f"  bound by {found.busiest}: {found.cycles_per_kmac:.2f} cycles per kMAC, tensor cores at most "
            f"{share:.1%}; {found.instructions_per_hmma:.2f} instructions per HMMA, "
            f"{found.barriers:.0f} barriers, {found.local_accesses:.0f} spill accesses a tile; "
            f"loop {found.loop_bytes} B"
        )


def row(
    name: str, head_dim: int, code: Static, speeds: list[float], perfect: float, published: float | None
) -> str:
    """One line of the table."""
    t = code.tally
    return TABLE.row(
        name, head_dim, t.cycles_per_kmac, t.busiest, t.instructions_per_hmma, t.barriers, code.spill_bytes,
        t.loop_bytes, code.hot_bytes, code.warps, f"{min(speeds):.1f}-{max(speeds):.1f}", perfect, published,
    )  # fmt: skip


def model_peer(peer: volta_peer.Peer) -> Figures:
    """A kernel of xformers, as its authors timed it."""
    kernel, launch = volta_peer.kernel(peer), volta_peer.launch(peer)
    done = work(kernel, launch, (1, 0, 5), launch.grid[0], volta_peer.SEQLEN // peer.block_k)
    code = static(kernel, done.paths[0], 2 * peer.block_q * peer.block_k * peer.head_dim)
    flops = 4.0 * peer.block_q * volta_peer.SEQLEN * peer.head_dim
    *calibrated, perfect = spread(kernel, done, done, [done.tiles], flops)
    return Figures(code, calibrated, perfect)


def records(
    case: str, head_dim: int, ours: Figures, peer: Figures | None, shared: Mapping[str, Any]
) -> list[Record]:
    """What --json writes for one row: the code's figures are compiled, its speeds modelled."""
    base = dict(shared) | {"bench": "volta", "case": f"{case} D={head_dim}", "spread": 0.0}
    compiled = base | {"claim": "compiled"}
    t = ours.static.tally
    theirs = peer.static.tally if peer else None
    lines = (
        ("pipe bound", "cycles/kMAC", t.cycles_per_kmac, theirs and theirs.cycles_per_kmac, TENSOR_LIMIT),
        (
            "instructions per HMMA",
            "1",
            t.instructions_per_hmma,
            theirs and theirs.instructions_per_hmma,
            None,
        ),
        ("barriers per tile", "1", t.barriers, theirs and theirs.barriers, None),
        ("loop", "B", t.loop_bytes, theirs and theirs.loop_bytes, None),
        ("hot loop code", "B", ours.static.hot_bytes, peer and peer.static.hot_bytes, None),
        ("resident warps", "1", ours.static.warps, peer and peer.static.warps, None),
    )
    found = []
    for metric, unit, value, other, limit in lines:
        better = None if not other else value / other if metric == "resident warps" else other / value
        against = ("xformers 0.0.23" if other else "", other, better)
        found.append(
            Record.of(compiled, metric, unit, value, against, ("tensor cores" if limit else "", limit))
        )
    for on, value, other in zip(
        CALIBRATED, ours.tflops, peer.tflops if peer else [None] * len(CALIBRATED), strict=True
    ):
        spread_of = (max(ours.tflops) - min(ours.tflops)) / max(ours.tflops)
        modelled = base | {"claim": "modelled", "spread": spread_of}
        against = ("xformers 0.0.23" if other else "", other, value / other if other else None)
        found.append(
            Record.of(modelled, f"speed, {on.name}", "TFLOP/s", value, against, ("tensor cores", PEAK))
        )
    return found


def decode_rows(head_dims: Sequence[int], shared: Mapping[str, Any]) -> list[Record]:
    """Prints what decode moves and how fast, and returns its records."""
    print(f"\ndecode, {volta_decode.KEYS} keys\n{DECODE.header()}")
    found = []
    for head_dim in head_dims:
        d = volta_decode.measure(head_dim)
        rates = f"{min(d.gigabytes_per_s):.0f}-{max(d.gigabytes_per_s):.0f}"
        print(DECODE.row(head_dim, d.moved_ratio, d.splits, rates, d.reachable), flush=True)
        base = {"bench": "volta", "case": f"decode D={head_dim}", "env": shared["env"], "spread": 0.0}
        emulated, modelled = base | {"claim": "emulated"}, base | {"claim": "modelled"}
        bound = ("memory", d.reachable)
        found.append(
            Record.of(emulated, "bytes moved / KV bytes", "1", d.moved_ratio, bound=("KV bytes", 1.0))
        )
        found.append(Record.of(modelled, "KV bytes", "GB/s", min(d.gigabytes_per_s), bound=bound))
    return found


def linear_rows(shared: Mapping[str, Any]) -> list[Record]:
    """Prints how fast packed weights are read, and returns its records."""
    print(f"\nlinear, {volta_linear.OUT}x{volta_linear.IN}: codes\n{LINEAR.header()}")
    found = []
    calls = [(bits, rows, 1) for bits in (4, 8) for rows in (1, 8, 16)]
    for bits, rows, ranks in (*calls, (4, 16, 2), (4, 16, 4), (4, 16, 8)):
        d = volta_linear.measure(bits, rows, ranks)
        rates = f"{min(d.gigabytes_per_s):.0f}-{max(d.gigabytes_per_s):.0f}"
        print(LINEAR.row(bits, ranks, rows, d.instructions, rates, d.perfect_fetch, d.reachable), flush=True)
        base = {
            "bench": "volta", "case": f"linear int{bits} M={rows}{f' of {ranks} ranks' if ranks > 1 else ''}",
            "env": shared["env"], "spread": 0.0, "claim": "modelled",
        }  # fmt: skip
        bound = ("memory", d.reachable)
        found.append(Record.of(base, "codes", "GB/s", min(d.gigabytes_per_s), bound=bound))
    return found


def gpu_rows(head_dims: Sequence[int], shared: Mapping[str, Any]) -> list[Record]:
    """Where there is a GPU, times the kernels' PTX on it; nothing where there is none."""
    gpu = volta_gpu.name()
    if gpu is None:
        return []
    print(f"\nprefill's PTX on {gpu}, {volta_gpu.SEQLEN} tokens: not a V100's speed\n{GPU.header()}")
    found = []
    for head_dim in head_dims:
        for causal in (False, True):
            t = volta_gpu.compare(head_dim, causal)
            case = "causal" if causal else "plain"
            print(GPU.row(case, head_dim, t.ours, t.sdpa, t.error), flush=True)
            base = {
                "bench": "volta", "case": f"{case} D={head_dim} as PTX on {gpu}, not a V100", "spread": 0.0,
                "claim": "measured", "env": shared["env"],
            }  # fmt: skip
            against = ("torch SDPA", t.sdpa, t.sdpa / t.ours)
            found.append(Record.of(base, "time", "ms", t.ours, against))
    return found


def main() -> None:
    """Entry point."""
    p = parser()
    a = p.parse_args()
    if a.cubin:
        if not a.macs or not a.warps:
            p.error("--cubin: needs --macs and --warps")
        bound(a.cubin, a.kernel, a.macs, a.warps)
        return
    shared = {"env": env.capture(1)}
    print(TABLE.header())
    peers: dict[int, Figures] = {}
    for peer in volta_peer.PEERS if a.peer else ():
        found = peers[peer.head_dim] = model_peer(peer)
        print(row("xformers", peer.head_dim, *found, peer.published), flush=True)
    written = []
    for head_dim in a.head_dim:
        for case in (c for c in CASES if c.name in a.case):
            ours = figures(case, head_dim)
            print(row(case.name, head_dim, *ours, None), flush=True)
            written += records(case.name, head_dim, ours, peers.get(head_dim), shared)
    if "decode" in a.case:
        written += decode_rows(a.head_dim, shared)
    if "linear" in a.case:
        written += linear_rows(shared)
    written += gpu_rows(a.head_dim, shared)
    if a.json:
        write(a.json, written)


if __name__ == "__main__":
    main()
