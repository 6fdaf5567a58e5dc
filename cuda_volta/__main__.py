"""``python -m cuda_volta build``: compiles the kernels for Volta or Turing, on any machine."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import catalog
from .binary import ARCHITECTURES, Binary
from .build import build
from .nvrtc import CompileError, NvrtcMissing, nvrtc, version_text
from .variant import Variant


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cuda_volta", description="Tools of the Volta kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    p = commands.add_parser("build", help="compile every kernel to cubins, index.json and, for sm_70, PTX")
    p.add_argument(
        "--arch", choices=ARCHITECTURES, default="sm_70",
        help="default: sm_70; sm_75 gets the kernels whose blocks fit its 64 KB of shared memory",
    )  # fmt: skip
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if needed")
    cores = len(os.sched_getaffinity(0))
    p.add_argument("--jobs", type=int, default=cores, metavar="N", help=f"processes; default: {cores}")
    p.add_argument("--match", default="", metavar="TEXT", help="only variants whose name contains it")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs}, expected at least 1")
    chosen = [v for v in catalog.variants(args.arch) if args.match in v.name]
    if not chosen:
        parser.error(f"argument --match: no variant for {args.arch} has {args.match!r} in its name")
    try:
        compiler = nvrtc()
        print(f"{len(chosen)} kernels for {args.arch}, NVRTC {version_text(compiler)}, {args.jobs} at a time")
        build(chosen, args.arch, args.out, args.jobs, lambda *done: _line(len(chosen), *done))
    except (NvrtcMissing, CompileError, OSError) as error:
        print(f"python -m cuda_volta build: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out / 'index.json'}")
    return 0


def _line(total: int, count: int, variant: Variant, built: Binary, seconds: float) -> None:
    spills = f", {built.spill_bytes} bytes of SPILLS" if built.spill_bytes else ""
    resources = f"{built.registers} registers, {built.shared_bytes} shared bytes{spills}"
    print(f"[{count}/{total}] {variant.name}: {resources} ({seconds:.1f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
