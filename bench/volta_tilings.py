"""Chooses how each Volta prefill kernel's main loop is cut, by the issue simulator, and writes the table.

Compiles every tiling that registers allow, drops those that spill, leave an SM below 8 warps or whose code
misses a bound that another's meets (`BOUNDS`), and keeps the one whose slowest calibrated machine is fastest
on the plain call (softcap, ALiBi) at 8192 tokens.

  bench/volta_tilings.py --head-dim 64 --features 0,1,2           prints those simulated, and the best
  bench/volta_tilings.py --head-dim 64 --features 0,1,2 --write   and replaces their rows of the table

Up to half a minute a candidate: 20 to 60 of them for one kernel.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from cuda_volta import prefill, tilings
from cuda_volta.sass.simulate.calibration import CALIBRATED
from cuda_volta.sass.simulate.machine import REGISTERS
from cuda_volta.tilings import Tiling
from lib.args import sweep
from lib.table import Column, Table
from lib.volta_cases import CASES, Case
from lib.volta_model import Static, compiled, figures, shipped

CASE_OF = {prefill.PLAIN: "plain", prefill.SOFTCAP: "softcap", prefill.ALIBI: "alibi"}
TABLE = Table(
    [
        Column("D", 3, "d"), Column("features", 8, "d"), Column("held", 4, "d"), Column("trip", 4, "d"),
        Column("roll", 4, "d"), Column("blocks", 6, "d"), Column("instr/HMMA", 10, ".3f"),
        Column("loop B", 6, "d"), Column("TFLOP/s", 11),
    ]
)  # fmt: skip
HELD, TRIPS, ROLLS = (0, 2, 4, 8), (1, 2, 4), (0, 1, 2)
#: Cycles for 1000 multiply-adds and instructions an HMMA, at most: of plain calls (False), of others.
BOUNDS = {False: (7.82, 1.9), True: (8.2, 2.1)}
CACHE_BYTES = 12 * 1024  # of instructions, next to a sub-core: what most tiles pass has to fit
_OTHER_REGISTERS = 60  # at least, beside those of O and the scores


def candidates(head_dim: int) -> Iterator[Tiling]:
    """Whole trips over the steps that Q in registers leaves; blocks as registers allow, or one fewer."""
    wide = head_dim > 128
    steps = head_dim // (16 if wide else 8)
    most = 1 if wide else REGISTERS // 128 // (head_dim + 32 + _OTHER_REGISTERS)
    resident = range(1 if wide else max(2, most - 1), most + 1)
    for held in (h for h in HELD if h <= steps):
        for trip in (t for t in TRIPS if (steps - held) % t == 0 and (t == 1 or steps > held)):
            yield from (Tiling(held, trip, roll, n) for roll in ROLLS for n in resident)


def code(head_dim: int, features: int, tiling: Tiling) -> Static | None:
    """The main loop's; None: it spills or leaves an SM below 8 warps."""
    variant = prefill.variant(head_dim, features, tiling)
    kernel = shipped(variant)
    if kernel.spill_bytes or kernel.residency.warps * kernel.residency.blocks < 8:
        return None
    return compiled(_case(features), head_dim, variant)


def meets(found: Static, features: int) -> bool:
    """Whether code meets the bounds; what remains to choose is what the simulator says."""
    cycles, instructions = BOUNDS[features != prefill.PLAIN]
    t = found.tally
    return (
        t.cycles_per_kmac <= cycles
        and t.instructions_per_hmma <= instructions
        and found.hot_bytes <= CACHE_BYTES
    )


def lowest(head_dim: int, features: int, tiling: Tiling) -> float:
    """Modelled TFLOP/s of the slowest machine."""
    found = figures(_case(features), head_dim, prefill.variant(head_dim, features, tiling))
    t = found.static.tally
    speeds = f"{min(found.tflops):.1f}-{max(found.tflops):.1f}"
    print(TABLE.row(head_dim, features, *tiling, t.instructions_per_hmma, t.loop_bytes, speeds), flush=True)
    return min(found.tflops[: len(CALIBRATED)])


def best(head_dim: int, features: int) -> Tiling:
    """The candidate whose slowest machine is fastest."""
    sound = {t: s for t in candidates(head_dim) if (s := code(head_dim, features, t)) is not None}
    within = [t for t, s in sound.items() if meets(s, features)]
    speeds = {t: lowest(head_dim, features, t) for t in within or sound}
    return max(speeds, key=lambda t: speeds[t])


def _case(features: int) -> Case:
    return next(c for c in CASES if c.name == CASE_OF[features])


def write(chosen: dict[tuple[int, int], Tiling]) -> None:
    """Replaces rows of cuda_volta/tilings.py."""
    file = Path(tilings.__file__)
    rows = "".join(f"    {key}: Tiling{tuple(t)},\n" for key, t in sorted(
        (tilings.TILINGS | chosen).items()))  # fmt: skip
    text = re.sub(
        r"(    # table\n).*(    # end of the table\n)",
        lambda m: m[1] + rows + m[2],
        file.read_text(),
        flags=re.DOTALL,
    )
    file.write_text(text)


def main() -> None:
    """Entry point."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--head-dim", type=sweep, default=prefill.HEAD_DIMS, metavar="D,...", help="default: all")
    p.add_argument("--features", default="0,1,2", metavar="F,...", help="0 plain, 1 softcap, 2 ALiBi")
    p.add_argument("--write", action="store_true", help="replace the rows of cuda_volta/tilings.py")
    a = p.parse_args()
    features = [int(f) for f in a.features.split(",")]
    if not set(features) <= set(CASE_OF):
        p.error(f"--features: {a.features}, accepted: any of 0,1,2")
    print(TABLE.header())
    chosen = {}
    for head_dim in a.head_dim:
        for f in features:
            chosen[head_dim, f] = best(head_dim, f)
            print(f"chosen: {chosen[head_dim, f]}, in the table: {tilings.TILINGS[head_dim, f]}", flush=True)
    if a.write:
        write(chosen)


if __name__ == "__main__":
    main()
