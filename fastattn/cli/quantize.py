"""The command ``fastattn quantize``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from ..parallel import group as ranks
from .common import read_text

if TYPE_CHECKING:
    from ..models.quantize import Report


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command line of ``fastattn quantize``."""
    p.description = (
        "Quantize a model's layers with GPTQ, from real text, into a Hugging Face directory. A run that was "
        "killed goes on where it stopped when it is repeated with the same arguments."
    )
    p.add_argument("model", help="a Hugging Face directory, a .gguf file, or 'smollm2'")
    p.add_argument("out", help="the directory to write")
    p.add_argument("--bits", type=int, default=4, help="2, 3, 4 (default) or 8")
    p.add_argument("--group-size", type=int, default=128, help="32, 64, 128 (default), or -1: whole rows")
    p.add_argument(
        "--act-order", nargs="?", const="global", default="group", metavar="ORDER",
        help="fill groups with columns of like activations, the largest first ('global'); 'head': inside "
        "heads in attention's output projections, which tensor parallelism needs to run them without a "
        "permutation; default: 'group', groups stay in place; 'none': as columns lie",
    )  # fmt: skip
    symmetry = p.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", action="store_true", default=True, help="no zero points (default)")
    symmetry.add_argument("--asym", dest="sym", action="store_false", help="a zero point a group")
    p.add_argument("--format", default="gptq", help="gptq (default) or gptq_v2: how zero points are stored")
    p.add_argument("--damp", type=float, default=0.01, help="on the Hessian's diagonal, of its mean")
    p.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text of the kind the model will see")
    p.add_argument("--eval-text", metavar="FILE", help="for perplexity; default: the last tenth of --text")
    p.add_argument("--samples", type=int, help="sequences of the text; default: 128, or what it has")
    p.add_argument("--seqlen", type=int, default=512, help="tokens of a sequence; default: 512")
    p.add_argument("--dtype", default="auto", help="of what stays dense; default: as in the model")
    p.add_argument("--threads", type=int, help="default: this machine's cores")
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the report")


def main(args: argparse.Namespace) -> int:
    """Quantizes; returns the exit status."""
    # Models bring safetensors, tokenizers and more.
    from ..models.quantize import quantize
    from ..quant.recipe import Recipe

    ranks.set_threads(ranks.single(), args.threads)
    recipe = Recipe(
        bits=args.bits, group_size=args.group_size, sym=args.sym, act_order=args.act_order, damp=args.damp,
        format=args.format,
    )  # fmt: skip
    report = quantize(
        args.model, args.out, recipe, read_text(args.text),
        eval_text=None if args.eval_text is None else read_text(args.eval_text), samples=args.samples,
        seqlen=args.seqlen, dtype=args.dtype, progress=not args.json and sys.stderr.isatty(),
    )  # fmt: skip
    print(json.dumps(report.to_json()) if args.json else _show(report))
    return 0


def _show(r: Report) -> str:
    return (
        f"{r.out}: {r.weights / 1e6:.1f} million weights at {r.bits_per_weight:.2f} bits, "
        f"{r.nbytes / 1e6:.1f} MB with what stays dense\n"
        f"perplexity on {r.tokens} held-out tokens: dense {r.dense.value:.3f}, "
        f"quantized {r.quantized.value:.3f} ({100 * r.change.value:+.2f} % +- {100 * r.change.error:.2f})"
    )
