"""Two-level tiling and the tiling-mask on Ascend, as the vendor's compiler plans them: nothing here runs on
an NPU.

Five tables. The plans are *compiled*: triton-ascend lowers the kernel and bishengir-compile plans it, on this
machine. What follows from them by counting is *modelled*.

  blocks   first-level tiles of 128 to 1024 keys: whether they fit, and how often Cube and Vector
  synchronise for one
           head. "one level" is the tile that is its own second level, 128 x 128, as in FlashAttention.
  mask     bytes of the tiling-mask against the mask that it stands for. on chip  bytes of the Unified
  Buffer that an edge block needs with the mask loaded, and with the mask computed
           from row and column numbers: the same kernel with one statement replaced.
  pypto    the time that the vendor's simulator gives a tile of 128 queries, by block size, if --pypto names a
           Python that has it (0.2.0). It spreads a block's parts over cores: part of a gain is parallelism.
  balance  the busiest core's work over the average core's, by order of the tiles (causal).

Needs the environment with triton-ascend and ascendnpu-ir; without it, only what needs no compiler is shown.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import ascend_ops.kernels
from ascend_ops.attention import attention
from ascend_ops.chips import CHIPS, Chip
from ascend_ops.planner import PrefillTiles, prefill_tiles
from ascend_ops.tiling_mask import tiling_mask
from ascend_ops.toolchain.client import call_all
from ascend_ops.toolchain.instances import Instance, recording
from lib import env
from lib.args import sweep
from lib.records import Record, ratio, write
from lib.table import Column, Table

ROOT = Path(__file__).resolve().parents[1]
ONE_LEVEL = 128
BLOCKS = Table(
    [
        Column("tile", 13), Column("plan", 26), Column("UB K", 6, ".1f"), Column("L1 K", 5, ".0f"),
        Column("L0C K", 5, ".0f"), Column("ring K", 6, ".0f"), Column("scores/block", 12, "d"),
        Column("syncs a head", 12, "d"), Column("one level/this", 14, ".2f"),
        Column("GM bytes/score", 14, ".1f"),
    ]
)  # fmt: skip
MASKS = Table(
    [
        Column("keys", 7, "d"), Column("S x S mask MiB", 14, ".0f"), Column("ours KiB", 8, ".0f"),
        Column("times", 10, ".0f"),
    ]
)  # fmt: skip
ON_CHIP = Table(
    [Column("tile", 13), Column("computed K", 14), Column("loaded K", 14), Column("saved %", 7, ".0f")]
)
PYPTO = Table(
    [
        Column("keys", 6, "d"),
        Column("block_k", 7, "d"),
        Column("model us", 8, ".1f"),
        Column("128/this", 8, ".2f"),
    ]
)
BALANCE = Table(
    [
        Column("keys", 6, "d"), Column("heads", 5, "d"), Column("contiguous", 10, ".3f"),
        Column("strided", 10, ".3f"), Column("ours", 10, ".3f"),
    ]
)  # fmt: skip
#: The statement of kernels/prefill.py that loads a window of the tiling-mask, and one that computes the same.
LOADED = "s += tl.load(band + (band_origin - reach) + window)"
COMPUTED = "s = tl.where(edge_columns[None, :] <= (rows + (own + right - slot))[:, None], s, HIDDEN)"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # The counts of bytes and the two levels are of chips whose scores cross through global memory.
    chips = sorted(name for name, chip in CHIPS.items() if not chip.whole_rows)
    p.add_argument("--chip", choices=chips, default="Ascend910B2", help="default: Ascend910B2")
    p.add_argument("--head_dim", type=sweep, default=(64, 128), help="default: 64,128")
    p.add_argument("--block_q", type=sweep, default=(64, 128), help="default: 64,128")
    p.add_argument("--block_k", type=sweep, default=(128, 256, 512, 1024), help="default: 128,256,512,1024")
    p.add_argument("--keys", type=int, default=32768, help="of the causal sequence; default: 32768")
    p.add_argument(
        "--python", type=Path, default=ROOT / ".venv-ascend" / "bin" / "python", help="with triton-ascend"
    )
    p.add_argument("--pypto", type=Path, metavar="PYTHON", help="with pypto: also simulate")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    return p


def blocks_of_head(tiles: PrefillTiles, keys: int) -> tuple[int, int]:
    """(full, edge) blocks of a causal head with as many queries as keys, as the kernel counts them."""
    full = edge = 0
    for first in range(0, keys, tiles.block_q):
        n = (first + 1) // tiles.block_k
        full += n
        edge += -(-(min(keys, first + tiles.block_q) - n * tiles.block_k) // tiles.edge_k)
    return full, edge


def bytes_per_score(tiles: PrefillTiles, head_dim: int) -> float:
    """Through global memory or L2, of a full block: scores and weights each written and read once, K and V
    read, the product written and read."""
    block_q, block_k = tiles.block_q, tiles.block_k
    moved = 2 * (4 + 2) * block_q * block_k + 2 * 2 * block_k * head_dim + 2 * 4 * block_q * head_dim
    return moved / (block_q * block_k)


def causal_kernel(tiles: PrefillTiles, head_dim: int) -> Instance:
    """The prefill kernel of a causal call under these tiles."""
    q = torch.empty(1, 1, 1, head_dim, dtype=torch.float16)
    with recording() as seen:
        attention(q, q, q, scale=1.0, causal=True, return_lse=True, tiles=tiles)
    return seen[0]


def plan_all(python: Path, chip: str, kernels: list[Instance], path: list[Path]) -> list[dict[str, Any]]:
    """The vendor's plan of each kernel."""
    requests = [kernel.planning(chip) for kernel in kernels]
    answers = call_all(python, path, "ascend_ops.toolchain.worker:plan_kernel", requests)
    return [answer[chip] for answer in answers]


def verdict(plan: Mapping[str, Any]) -> str:
    """In a few words."""
    if plan["accepted"]:
        return "fits, single buffers" if plan["retried"] else "fits"
    return "over: " + ", ".join(f"{name} {need / 1024:.0f} K" for name, (need, _) in plan["overflow"].items())


def tiling(args: argparse.Namespace, head_dim: int, shared: dict[str, Any]) -> Iterator[Record]:
    """The first table."""
    tiles = [PrefillTiles(q, k, min(k, ONE_LEVEL)) for q in args.block_q for k in args.block_k]
    tiles = list(dict.fromkeys((PrefillTiles(ONE_LEVEL, ONE_LEVEL, ONE_LEVEL), *tiles)))
    found = plan_all(args.python, args.chip, [causal_kernel(t, head_dim) for t in tiles], [ROOT])
    chosen = prefill_tiles(CHIPS[args.chip], head_dim, head_dim)
    one_level = sum(blocks_of_head(PrefillTiles(ONE_LEVEL, ONE_LEVEL, ONE_LEVEL), args.keys))
    print(f"\nblocks: head_dim {head_dim}, causal, {args.keys} queries and keys (compiled; counts modelled)")
    print(BLOCKS.header())
    for tile, plan in zip(tiles, found, strict=True):
        syncs, per_full = None, 0
        if plan["accepted"]:
            per_full, per_edge = (plan["syncs"]["aic"] * 2)[:2]
            full, edge = blocks_of_head(tile, args.keys)
            syncs = full * per_full + edge * per_edge
        fewer = one_level * per_full / syncs if syncs else None
        used = [plan["occupancy"][m] / 1024 if plan["accepted"] else None for m in ("UB", "L1", "L0C")]
        ring = plan["workspace"] / 1024 if plan["accepted"] else None
        name = f"{tile.block_q} x {tile.block_k}{' *' if tile == chosen else ''}"
        traffic = bytes_per_score(tile, head_dim)
        print(
            BLOCKS.row(name, verdict(plan), *used, ring, tile.block_q * tile.block_k, syncs, fewer, traffic)
        )
        if syncs:
            case = f"tile {tile.block_q}x{tile.block_k} head_dim={head_dim} causal keys={args.keys}"
            against = ("one level", one_level * per_full, fewer)
            yield Record.of(
                {**shared, "case": case, "claim": "modelled"}, "synchronisations a head", "", syncs, against
            )
    print("* what the planner chooses")


def masks(chip: Chip, shared: dict[str, Any]) -> Iterator[Record]:
    """The second table: the bytes of real tensors, against S x S of float16."""
    tiles = prefill_tiles(chip, 128, 128)
    print(f"\nmask: head_dim 128, tiles {tiles.block_q} x {tiles.edge_k} (S x S: float16)\n{MASKS.header()}")
    for keys in (1 << 12, 1 << 16, 1 << 18):
        ours = tiling_mask(tiles.block_q, tiles.edge_k, None, 0, torch.device("cpu")).matrix.nbytes
        whole = 2 * keys * keys
        print(MASKS.row(keys, whole / 2**20, ours / 1024, whole / ours))
        case = {**shared, "case": f"causal mask keys={keys}", "claim": "measured"}
        yield Record.of(case, "bytes", "B", ours, ("S x S float16", whole, ratio(ours, whole, False)))


def on_chip(args: argparse.Namespace, shared: dict[str, Any]) -> Iterator[Record]:
    """The third table: blocks that are edge blocks in full, with either mask."""
    source = (Path(ascend_ops.kernels.__file__).parent / "prefill.py").read_text()
    if source.count(LOADED) != 1:
        sys.exit("bench/ascend.py: kernels/prefill.py loads the mask in another way than this program knows")
    tiles = [PrefillTiles(q, k, k) for q, k in ((64, 256), (64, 512), (128, 256), (128, 512), (256, 128))]
    loaded = [causal_kernel(t, 128) for t in tiles]
    with tempfile.TemporaryDirectory() as folder:
        variant = source.replace(LOADED, COMPUTED).replace("from .blocks", "from ascend_ops.kernels.blocks")
        (Path(folder) / "computed_mask.py").write_text(variant)
        computed = [i._replace(kernel="computed_mask:prefill_kernel") for i in loaded]
        plans = plan_all(args.python, args.chip, [*loaded, *computed], [ROOT, Path(folder)])
    print(f"\non chip: head_dim 128, every block an edge block (compiled; R: refused)\n{ON_CHIP.header()}")
    for tile, ours, theirs in zip(tiles, plans[: len(tiles)], plans[len(tiles) :], strict=True):
        needs = [
            plan["occupancy"]["UB"] if plan["accepted"] else plan["overflow"]["UB"][0]
            for plan in (theirs, ours)
        ]
        texts = [
            f"{n / 1024:.1f}{'' if p['accepted'] else ' R'}"
            for n, p in zip(needs, (theirs, ours), strict=True)
        ]
        # An accepted plan spreads out over what there is: only refusals tell what is needed.
        saved = None if ours["accepted"] and theirs["accepted"] else 100 * (1 - needs[1] / needs[0])
        print(ON_CHIP.row(f"{tile.block_q} x {tile.block_k}", *texts, saved))
        if saved is not None:
            case = {
                **shared,
                "case": f"edge block {tile.block_q}x{tile.block_k} head_dim=128",
                "claim": "compiled",
            }
            against = ("mask computed", float(needs[0]), ratio(needs[1], needs[0], False))
            yield Record.of(case, "Unified Buffer", "B", needs[1], against)


def simulated(args: argparse.Namespace, shared: dict[str, Any]) -> Iterator[Record]:
    """The fourth table: what pypto's simulator prints."""
    print(
        f"\npypto: 128 queries, head_dim 128, no mask (modelled by the vendor's simulator)\n{PYPTO.header()}"
    )
    program = Path(__file__).parent / "lib" / "pypto_attention.py"
    for keys in (1024, 4096):
        first = None
        for block_k in (128, 256, 512, 1024):
            with tempfile.TemporaryDirectory() as folder:
                command = [str(args.pypto), str(program), str(block_k), str(keys)]
                done = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
                )
            found = re.search(r"End-to-End Time: ([\d.]+)", done.stdout)
            if found is None:
                sys.exit(f"bench/ascend.py: {args.pypto}: pypto simulated nothing:\n{done.stderr[-2000:]}")
            time_us = float(found[1])
            first = first or time_us
            print(PYPTO.row(keys, block_k, time_us, first / time_us), flush=True)
            case = {**shared, "case": f"pypto block_k={block_k} keys={keys}", "claim": "modelled"}
            yield Record.of(case, "time", "us", time_us, ("block_k=128", first, first / time_us))


def balance(chip: Chip, shared: dict[str, Any]) -> Iterator[Record]:
    """The fifth table: keys that each core visits, by the order in which cores take the tiles."""
    tiles = prefill_tiles(chip, 128, 128)
    cores = chip.cube_cores
    print(f"\nbalance: causal, {cores} cores, busiest over average (modelled)\n{BALANCE.header()}")
    for keys, heads in ((4096, 1), (4096, 8), (8192, 8), (32768, 8)):
        costs = [
            min(keys, first + tiles.block_q)
            for first in reversed(range(0, keys, tiles.block_q))
            for _ in range(heads)
        ]
        orders = {
            "contiguous": [n * cores // len(costs) for n in range(len(costs))],
            "strided": [n % cores for n in range(len(costs))],
            "ours": [n % cores if n // cores % 2 == 0 else cores - 1 - n % cores for n in range(len(costs))],
        }
        worst = {}
        for name, owners in orders.items():
            load = [0] * cores
            for owner, cost in zip(owners, costs, strict=True):
                load[owner] += cost
            worst[name] = max(load) * cores / sum(load)
        print(BALANCE.row(keys, heads, worst["contiguous"], worst["strided"], worst["ours"]))
        case = {**shared, "case": f"balance keys={keys} heads={heads}", "claim": "modelled"}
        against = ("strided", worst["strided"], worst["strided"] / worst["ours"])
        yield Record.of(case, "busiest core over average", "", worst["ours"], against, ("even", 1.0))


def main() -> None:
    """Prints the tables."""
    args = parser().parse_args()
    facts = env.capture(1)
    chip = CHIPS[args.chip]
    shared = {"bench": "ascend", "spread": 0.0, "env": facts}
    print(f"{env.headline(facts)} | {args.chip}: planned by its compiler, not run on an NPU")
    records: list[Record] = []
    if args.python.exists():
        for head_dim in args.head_dim:
            records += tiling(args, head_dim, shared)
        records += on_chip(args, shared)
    else:
        print(
            f"WARNING: no {args.python}: the tables that the vendor's compiler makes are left out",
            file=sys.stderr,
        )
    records += masks(chip, shared)
    if args.pypto:
        records += simulated(args, shared)
    records += balance(chip, shared)
    if args.json:
        write(args.json, records)


if __name__ == "__main__":
    main()
