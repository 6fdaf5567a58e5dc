"""What GPTQ saves of the perplexity that rounding to nearest adds, on a real model.

Each method writes a checkpoint, which is read back and measured. Calibration text are the docstrings of the
standard library, evaluation text is the language reference (pydoc_data.topics): other text by other
authors. Of each chunk of --context tokens the second half is scored.

  rtn          round to nearest, each group's scale spans its largest weight
  rtn-search   the same with scales that minimize the squared error
  gptq         columns as they lie
  gptq-group   groups as they lie, visited by their activations (the default of `fastattn quantize`)
  act-order    groups by activations (desc_act)
  act-head     the same, but inside heads where attention's output projection is concerned

  change       of the perplexity, against the dense weights; +- is the standard error, paired by token
  recovered    of what rtn adds; +- is the standard error, by the jackknife over chunks
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.models.checkpoint import Checkpoint, open_checkpoint
from fastattn.models.dense import DenseWeights
from fastattn.models.layerwise import layerwise_nll
from fastattn.models.perplexity import change, chunks, perplexity
from fastattn.models.quantize import write_quantized
from fastattn.parallel.group import set_threads, single
from fastattn.quant.recipe import Recipe
from lib import env, text
from lib.args import names, positive, sweep
from lib.records import Record, write
from lib.table import Column, Table

METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "act_order": "none", "search": False},
    "rtn-search": {"method": "rtn", "act_order": "none"},
    "gptq": {"act_order": "none"},
    "gptq-group": {"act_order": "group"},
    "act-order": {"act_order": "global"},
    "act-head": {"act_order": "head"},
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="smollm2", help="a directory, a GGUF file, or smollm2 (default)")
    p.add_argument("--bits", type=sweep, default=(4,), help="default: 4")
    p.add_argument("--group-size", type=int, default=128, help="32, 64, 128 (default), or -1")
    p.add_argument("--asym", action="store_true", help="with zero points; default: symmetric")
    p.add_argument(
        "--method", type=names(tuple(METHODS)), default=("gptq-group",), metavar="M,M",
        help=f"beside rtn, out of {', '.join(METHODS)}; default: gptq-group",
    )  # fmt: skip
    p.add_argument("--samples", type=positive, default=16, help="calibration sequences; default: 16")
    p.add_argument("--seqlen", type=positive, default=512, help="their tokens; default: 512")
    p.add_argument(
        "--context", type=positive, default=512, help="tokens of an evaluation chunk; default: 512"
    )
    p.add_argument("--chunks", type=positive, default=8, help="default: 8")
    p.add_argument("--threads", type=positive, help="default: the cores of this machine")
    p.add_argument("--json", metavar="FILE", help="write the records of docs/benchmarks.md")
    return p


@dataclass(frozen=True)
class Result:
    """One method at one number of bits: the likelihoods of all scored tokens, and what it took."""

    method: str
    bits: int
    losses: Tensor
    seconds: float


def main() -> None:
    """Every method quantizes the same weights from the same text, and is measured on the same tokens."""
    args = parser().parse_args()
    threads = set_threads(single(), args.threads).num
    machine = env.capture(threads)
    checkpoint = open_checkpoint(args.model)
    tokenizer = checkpoint.tokenizer()
    try:
        calibration = chunks(tokenizer, text.docstrings(), args.seqlen, args.samples)
        evaluation = chunks(tokenizer, text.reference(), args.context, args.chunks)
    except ValueError as error:
        raise SystemExit(f"--samples, --seqlen, --context, --chunks: {error}") from None
    print(f"{args.model}: {env.headline(machine)}")
    base = layerwise_nll(DenseWeights(checkpoint), evaluation)
    print(
        f"dense: perplexity {perplexity(base).value:.4f} on {len(base)} tokens, text of {machine['python']}"
    )
    table = header()
    records: list[Record] = []
    what = f"group={args.group_size} {'asym' if args.asym else 'sym'} samples={args.samples}x{args.seqlen}"
    for bits in args.bits:
        rtn = None
        for method in ("rtn", *(m for m in args.method if m != "rtn")):
            recipe = Recipe(bits, args.group_size, not args.asym, **METHODS[method])
            found = measure(method, checkpoint, recipe, calibration, evaluation)
            rtn = rtn or found
            print(row(table, found, rtn, base, args.chunks), flush=True)
            case = f"{Path(args.model).name} {method} bits={bits} {what}"
            records += to_records(case, found, rtn, base, args.chunks, machine)
    if args.json:
        write(args.json, records)


def measure(
    method: str,
    checkpoint: Checkpoint[Any],
    recipe: Recipe,
    calibration: list[list[int]],
    evaluation: list[list[int]],
) -> Result:
    """Quantizes to disk, reads back, and scores."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_quantized(checkpoint, folder, recipe, calibration)
        seconds = time.perf_counter() - start
        losses = layerwise_nll(DenseWeights(open_checkpoint(folder)), evaluation)
    return Result(method, recipe.bits, losses, seconds)


def recovered(losses: Tensor, rtn: Tensor, base: Tensor) -> float:
    """The part of the perplexity that ``rtn`` adds which ``losses`` do not have."""
    ours, theirs, dense = (math.exp(float(x.mean())) for x in (losses, rtn, base))
    return 1 - (ours - dense) / (theirs - dense)


def jackknife(statistic: Callable[..., float], count: int, *samples: Tensor) -> float:
    """Standard error of a statistic of paired samples, out of ``count`` blocks left out one at a time."""
    blocks = [x.view(count, -1) for x in samples]
    keep = ~torch.eye(count, dtype=torch.bool)
    values = torch.tensor([statistic(*(b[k].flatten() for b in blocks)) for k in keep], dtype=torch.float64)
    return float(((count - 1) * values.var(correction=0)).sqrt())


def header() -> Table:
    """Prints the titles."""
    table = Table(
        [
            Column("bits", 4, "d"),
            Column("method", 10),
            Column("perplexity", 10, ".4f"),
            Column("change %", 8, "+.2f"),
            Column("+-", 5, ".2f"),
            Column("recovered %", 11, ".1f"),
            Column("+-", 5, ".1f"),
            Column("seconds", 7, ".0f"),
        ]
    )
    print(table.header())
    return table


def row(table: Table, found: Result, rtn: Result, base: Tensor, count: int) -> str:
    """One line of the table."""
    changed = change(found.losses, base)
    share = error = None
    if found is not rtn:
        share, error = (100 * x for x in _recovered(found, rtn, base, count))
    value = perplexity(found.losses).value
    return table.row(
        found.bits, found.method, value, 100 * changed.value, 100 * changed.error, share, error, found.seconds
    )


def _recovered(found: Result, rtn: Result, base: Tensor, count: int) -> tuple[float, float]:
    samples = (found.losses, rtn.losses, base)
    return recovered(*samples), jackknife(recovered, count, *samples) if count > 1 else 0.0


def to_records(
    case: str, found: Result, rtn: Result, base: Tensor, count: int, machine: dict[str, str | int]
) -> list[Record]:
    """Perplexity with rtn as the peer; its change and what is recovered, standard errors as spread."""
    shared = {"bench": "quantizer", "case": case, "spread": 0.0, "claim": "measured", "env": machine}
    ours, theirs = (perplexity(r.losses).value for r in (found, rtn))
    changed = change(found.losses, base)
    records = [
        Record.of(
            shared, "perplexity", "", ours, ("rtn", theirs, theirs / ours), ("dense", perplexity(base).value)
        ),
        Record.of(
            {**shared, "spread": 100 * changed.error}, "change of perplexity", "%", 100 * changed.value
        ),
        Record.of(shared, "time to quantize", "s", found.seconds),
    ]
    if found is not rtn:
        share, error = _recovered(found, rtn, base, count)
        records.append(
            Record.of({**shared, "spread": 100 * error}, "recovered of what rtn adds", "%", 100 * share)
        )
    return records


if __name__ == "__main__":
    main()
