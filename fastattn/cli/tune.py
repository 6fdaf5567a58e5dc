"""``fastattn tune``: measures tiles of the Triton kernels on this machine's GPU and remembers the fastest."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

import torch

from .. import dispatch

if TYPE_CHECKING:
    from ..triton_ops.tune import Found
    from ..triton_ops.tune_linear import Found as LinearFound


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn tune``."""
    p.description = (
        "Measure tiles of the Triton kernels of attention and linear layers on a GPU and keep the fastest in "
        "the user's cache, where later processes find them. Nothing else ever tunes: without it the shipped "
        "tables serve."
    )
    p.add_argument("--device", type=int, default=0, help="number of the GPU; default: 0")
    p.add_argument("--only", choices=("attention", "linear"), help="tiles of these kernels; default: both")
    p.add_argument("--float32", action="store_true", help="also attention in float32, which takes longer")
    p.add_argument("--dry-run", action="store_true", help="print what was found, keep nothing")


def main(args: argparse.Namespace) -> int:
    """Tunes; returns the exit status."""
    why = dispatch.unavailable("triton")
    if not why and not torch.cuda.is_available():
        why = ("an emulated backend has no speed to tune",)
    if why:
        print(f"fastattn tune: {'; '.join(why)}", file=sys.stderr)
        return 1
    if not 0 <= args.device < torch.cuda.device_count():
        present = torch.cuda.device_count()
        print(f"fastattn tune: --device {args.device}, expected less than {present}", file=sys.stderr)
        return 1
    from ..triton_ops import tune, tune_linear, tuned
    from ..triton_ops.device import chip
    from ..triton_ops.linear_tiles import MANY

    device = torch.device("cuda", args.device)
    here = chip(device)
    print(f"{here.name}, compute capability {here.capability / 10}")
    attention, linear = {}, {}
    with torch.cuda.device(device), torch.inference_mode():
        if args.only != "linear":
            needs = tune.all_needs(here, (2, 4) if args.float32 else (2,))
            for f in tune.search(device, needs, tune.Sizes()):
                kind = "decode" if f.need.decode else "prefill"
                _print(f"{kind:8} width {f.need.width:3}, {8 * f.need.itemsize} bits", f)
                attention[f.need] = f.tile
        if args.only != "attention":
            for g in tune_linear.search(device, tune_linear.all_needs(here), tune_linear.Sizes()):
                rows = "many" if g.need.rows == MANY else f"{g.need.rows:4}"
                _print(f"linear   rows {rows}, {g.need.bits} bits", g)
                linear[g.need] = g.tile
    if not args.dry_run:
        print(f"kept in {tuned.save(here, tuned.Tuned(attention, linear))}")
    return 0


def _print(what: str, f: Found | LinearFound) -> None:
    gain = f.served_seconds / f.seconds
    print(
        f"{what}: {tuple(f.tile)} {1e3 * f.seconds:.3f} ms, {gain:.2f}x the table's, of {f.tried} tiles",
        flush=True,
    )
