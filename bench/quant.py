"""Linear layers on quantized weights against torch's, with this machine's limits beside.

Rivals compute the same product: "torch int4" is the kernel of torch's own weight-only quantization (bf16 x
only; private, and left out where this torch lacks it), "torch bf16" and "torch fp32" are F.linear on weights
dequantized beforehand to x's data type. The ratio is that to the faster of them.

The limit is the roofline of the row: the bytes of the packed weight at the read bandwidth, or the FLOP at
the GEMM rate of x's data type, whichever takes longer; with int8 activations only the former, since integers
may be multiplied faster. A sample is 8 calls of one rival, back to back, as a model calls its layers one
after another; its time is divided by 8. Calls of every rival cycle through copies of the weight of 8 times
the last-level cache, so that every weight comes from memory. Samples of all rivals and of both limits
alternate; medians are shown. What a single call costs whose code and data other work has put out of the
caches is another matter: docs/cpu.md has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from lib import env
from lib.args import ACTS, DTYPES, names, positive, sweep
from lib.limits import Work, gemm, reading
from lib.quant_cases import FORMATS, Layer, Operands, Rival, nbytes, torch_has_int4
from lib.records import Record, claim, ratio, write
from lib.table import Column, Table
from lib.timing import Timing, time_calls

CALLS = 8  # of a sample


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    p.add_argument("--format", type=names(tuple(FORMATS)), default=("int4-32", "int4-128"), metavar="F,F",
                   help=f"out of {', '.join(FORMATS)} (bits, group); default: int4-32,int4-128")  # fmt: skip
    p.add_argument("--shape", type=shapes, default=((4096, 4096),), metavar="OxI,OxI", help="of W")
    p.add_argument("--rows", type=sweep, default=(1, 4, 16, 64, 256), metavar="N,N", help="of x")
    p.add_argument("--data_type", type=names(tuple(DTYPES)), default=("bf16", "fp32"), metavar="T,T")
    p.add_argument("--act", type=names(tuple(ACTS)), default=("none",), metavar="A,A",
                   help="may activations be quantized: none (no), int8; default: none")  # fmt: skip
    p.add_argument("--seconds", type=float, default=1.0, help="spent on each row; default: 1")
    p.add_argument("--threads", type=positive, default=env.cores(), help="default: all cores")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    p.add_argument("--plot", metavar="FILE.png", help="draw the times over the rows of x")
    return p


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "4096x4096,11008x4096": rows and columns of W; the columns are whole groups of 128."""
    found = []
    for item in text.split(","):
        out, _, inn = item.partition("x")
        found.append((positive(out), positive(inn)))
        if found[-1][1] % 128:
            raise argparse.ArgumentTypeError(f"{item!r}, expected a multiple of 128 columns")
    return tuple(found)


def measure(
    operands: Operands, rows: int, act: str, limits: dict[str, Work], seconds: float
) -> dict[str, Timing]:
    """Checks that the rivals agree, then times them and the limits in turn."""
    layer = operands.layer
    x, named = torch.randn(rows, layer.inn).to(DTYPES[layer.dtype]), operands.rivals(act)
    results = {name: rival(x).float() for name, rival in named.items()}
    expected = results[f"torch {layer.dtype}"]
    for name, result in results.items():
        apart = float((result - expected).abs().max() / expected.abs().max())
        if not apart < 0.03:
            raise SystemExit(f"{layer.name(rows, act)}: {name} is {apart:.3g} of the largest value off")
    calls: dict[str, Callable[[], object]] = {name: partial(back_to_back, f, x) for name, f in named.items()}
    timings = time_calls(calls | {name: work.call for name, work in limits.items()}, seconds)
    return timings | {name: Timing(timings[name].median / CALLS, timings[name].spread) for name in named}


def back_to_back(rival: Rival, x: torch.Tensor) -> None:
    """One sample."""
    for _ in range(CALLS):
        rival(x)


def bound(operands: Operands, rows: int, act: str, seconds: dict[str, float]) -> tuple[str, float]:
    """What binds the row, and the seconds that it takes at least; ``seconds`` for a byte and for a FLOP."""
    layer = operands.layer
    read, compute = nbytes(operands.weights[0]) * seconds["read"], layer.flop(rows) * seconds["GEMM"]
    if ACTS[act] or read >= compute:
        return "memory bandwidth", read
    return f"{'fp32' if layer.dtype == 'fp16' and not env.on_gpu() else layer.dtype} GEMM", compute


def row(
    operands: Operands, rows: int, act: str, limits: dict[str, Work], seconds: float, table: Table,
    facts: dict[str, str | int],
) -> list[Record]:  # fmt: skip
    """Measures one row, prints it and returns a record for each peer."""
    timings = measure(operands, rows, act, limits, seconds)
    costs = {name: timings.pop(name).median / work.amount for name, work in limits.items()}
    limit, least = bound(operands, rows, act, costs)
    mine, case = timings.pop("fastattn"), operands.layer.name(rows, act)
    shared: dict[str, Any] = {
        "bench": "quant", "case": case, "spread": mine.spread, "claim": claim(), "env": facts,
    }  # fmt: skip
    records = [
        Record.of(
            shared, "time", "ms", 1e3 * mine.median,
            (peer, 1e3 * theirs.median, ratio(mine.median, theirs.median, higher_is_better=False)),
            (limit, 1e3 * least),
        )
        for peer, theirs in timings.items()
    ]  # fmt: skip
    theirs = {peer.split()[1] == "int4": 1e3 * t.median for peer, t in timings.items()}
    best = min(r.ratio for r in records if r.ratio is not None)
    cells = (1e3 * mine.median, theirs.get(True), theirs[False], best, 1e3 * least, limit)
    print(table.row(case, *cells, 100 * least / mine.median), flush=True)
    return records


@torch.inference_mode()
def main() -> None:
    """Measures every row that was asked for."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    env.use_device(args.device)
    facts = env.capture(args.threads)
    print(f"{env.headline(facts)} | {args.threads} threads")
    if not env.on_gpu() and not torch_has_int4():
        print(f"torch {torch.__version__} has no int4 kernel for the CPU: it is left out")
    table = Table(
        [
            Column("case", 44), Column("ours ms", 8, ".3f"), Column("int4 ms", 8, ".3f"),
            Column("dense ms", 8, ".3f"), Column("ratio", 5, ".2f"), Column("limit ms", 8, ".3f"),
            Column("bound by", 16), Column("% of it", 7, ".0f"),
        ]
    )  # fmt: skip
    print(table.header(), flush=True)
    reader = reading()
    records: list[Record] = []
    for fmt, (out, inn), dtype in product(args.format, args.shape, args.data_type):
        operands = Operands.of(Layer(fmt, out, inn, dtype))
        limits = {"read": reader, "GEMM": gemm(DTYPES[dtype], 1536)}
        for act, rows in product(args.act, args.rows):
            records += row(operands, rows, act, limits, args.seconds, table, facts)
    if args.json:
        write(args.json, records)
    if args.plot:
        from lib.plot import quant

        quant(records, args.plot)


if __name__ == "__main__":
    main()
