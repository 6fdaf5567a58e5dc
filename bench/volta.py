"""How fast Volta kernels can run, from their machine code: no GPU is needed, and no speed is measured.

  bench/volta.py --cubin FILE --kernel REGEX --macs M --warps W

bounds the kernels of any cubin by their busiest pipe: M multiply-adds a block does for one K/V tile
(2 block_q block_k head_dim), W warps a block has.
"""

from __future__ import annotations

import argparse
import re
import sys

from cuda_volta.sass import listing, pipes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cubin", metavar="FILE")
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
            f"{share:.1%}; {found.instructions_per_hmma:.2f} instructions per HMMA, {found.barriers:.0f} barriers, "
            f"{found.local_accesses:.0f} spill accesses a tile; loop {found.loop_bytes} B"
        )


def main() -> None:
    """Entry point."""
    a = parser().parse_args()
    bound(a.cubin, a.kernel, a.macs, a.warps)


if __name__ == "__main__":
    main()
