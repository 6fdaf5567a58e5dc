"""``fastattn tune``: measures tiles of the Triton kernels on this machine's GPU and remembers the fastest."""

from __future__ import annotations

import argparse
import sys

import torch

from . import dispatch


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn tune``."""
    p.description = (
        "Measure tiles of the Triton attention kernel on a GPU and keep the fastest in the user's cache, "
        "where later processes find them. Nothing else ever tunes: without it the shipped table serves."
    )
    p.add_argument("--device", type=int, default=0, help="number of the GPU; default: 0")
    p.add_argument("--float32", action="store_true", help="also tiles for float32, which take longer")
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
    from .triton_ops import tune, tuned
    from .triton_ops.device import chip

    device = torch.device("cuda", args.device)
    here = chip(device)
    print(f"{here.name}, compute capability {here.capability / 10}")
    found = {}
    with torch.cuda.device(device), torch.inference_mode():
        for f in tune.search(device, tune.all_needs(here, (2, 4) if args.float32 else (2,)), tune.Sizes()):
            kind = "decode" if f.need.decode else "prefill"
            gain = f.shipped_seconds / f.seconds
            print(
                f"{kind:8} width {f.need.width:3}, {8 * f.need.itemsize} bits: {tuple(f.tile)} "
                f"{1e3 * f.seconds:.3f} ms, {gain:.2f}x the table's, of {f.tried} tiles",
                flush=True,
            )
            found[f.need] = f.tile
    if not args.dry_run:
        print(f"kept in {tuned.save(here, found)}")
    return 0
