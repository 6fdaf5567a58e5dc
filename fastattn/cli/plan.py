"""The command ``fastattn plan``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..parallel import group as ranks
from ..spec import Link, TPGroup
from .common import add_rank_arguments, on_ranks, read_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..models.generate import Model
    from ..models.planning import Findings
    from ..models.quality import Quality
    from ..models.trial import Trials
    from ..parallel.forecast import Costs
    from ..parallel.planner import Choice


_CONTEXT = 512  # tokens of a chunk of --text
_CHUNKS = 32  # at most; one half is scored


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The command line of ``fastattn plan``."""
    p.description = (
        "Measure the link and the compute rates of the running ranks, and write the fastest sync plan to a "
        "file for `fastattn generate --sync`. Run it under torchrun or any launcher, as generate will be run."
    )
    p.add_argument("model", help="a Hugging Face directory, a .gguf file, or 'smollm2'")
    p.add_argument("--out", required=True, metavar="PLAN.json", help="the file to write")
    p.add_argument("--prefill-tokens", type=int, default=512, help="of the prompt; default: 512")
    p.add_argument("--batch", type=int, default=1, help="sequences of a decode step; default: 1")
    p.add_argument(
        "--text", metavar="FILE",
        help="UTF-8 text on which lossy policies are judged; without it, only exact ones are considered",
    )  # fmt: skip
    p.add_argument(
        "--max-increase", type=float, default=0.02,
        help="of the perplexity on --text, as a share, with 95%% confidence; default: 0.02",
    )  # fmt: skip
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16; as for generate")
    p.add_argument("--act", default="", help="as for generate")
    p.add_argument(
        "--budget", type=float, default=20.0, metavar="SECONDS",
        help="about what measuring may take, prefill and decode each; default: 20",
    )  # fmt: skip
    add_rank_arguments(p)


def main(args: argparse.Namespace) -> int:
    """Writes the plan; returns the exit status."""
    return on_ranks(args, _run)


def _run(args: argparse.Namespace, group: TPGroup) -> None:
    from ..models.checkpoint import open_checkpoint
    from ..models.load import load
    from ..models.planning import Planner
    from ..models.trial import Trials
    from ..parallel import plan as plans

    first = group.rank == 0
    if first and not Path(args.out).absolute().parent.is_dir():  # before minutes of measuring
        raise ValueError(f"--out: {Path(args.out).parent}: no such folder")
    say: Callable[[str], None] = _print if first else _keep_quiet
    text = read_text(args.text) if first and args.text else None
    threads = ranks.set_threads(group, args.threads)
    model = load(args.model, dtype=args.dtype, act=args.act, tp=group, progress=first and sys.stderr.isatty())
    dtype = str(model.dtype).removeprefix("torch.")
    say(f"{args.model}, {dtype}: {group.world} ranks, {threads.num} threads each ({threads.why})")
    trials = Trials(model, args.prefill_tokens, args.batch)
    quality = _quality(args, model, text) if args.text and group.world > 1 else None
    if quality is not None:
        perplexity = f"{quality.exact.value:.3f} +- {quality.exact.error:.3f}"
        say(f"perplexity under exact sums {perplexity}, {quality.tokens} tokens of {args.text}")
    planner = Planner(model, open_checkpoint(args.model).fingerprint(), trials, quality, args.budget, say)
    findings = planner.plan()
    _report(findings, trials, say)
    if first:
        plans.write(args.out, findings.plan)
        say(f"\nwritten: {args.out}")


def _quality(args: argparse.Namespace, model: Model, text: str | None) -> Quality:
    from ..models.perplexity import chunks
    from ..models.quality import Quality

    if text is None:
        return Quality(model, None, args.max_increase)
    context = min(_CONTEXT, model.config.context)
    count = min(_CHUNKS, len(model.tokenizer.encode(text)) // context)
    return Quality(model, chunks(model.tokenizer, text, context, max(2, count)), args.max_increase)


def _print(text: str) -> None:
    print(text, flush=True)


def _keep_quiet(_: str) -> None:
    """Rank 0 speaks for all."""


# ---------------------------------------------------------------------------------------------- report
def _report(found: Findings, trials: Trials, say: Callable[[str], None]) -> None:
    if found.link is not None:
        say(_link(found.link))
    for phase, choice in found.choices.items():
        rows = trials.rows(phase)
        unit = f"a prompt of {sum(rows)} tokens" if phase == "prefill" else f"a step of {rows[0]} sequences"
        say(f"\n{phase}, {unit}")
        if phase in found.costs:
            say(_rates(found.costs[phase], rows[0]))
            _table(choice, say)
        say(f"  chosen: {choice.trial.candidate} ({choice.reason})")


def _link(link: Link) -> str:
    text = f"link: {1e6 * link.latency_s:.0f} us a hop, {8e-6 * link.bytes_per_s:.0f} Mb/s"
    if link.all_reduce_s is None or link.all_reduce_bytes_per_s is None:
        return text
    own = f"{1e6 * link.all_reduce_s:.0f} us and {8e-6 * link.all_reduce_bytes_per_s:.0f} Mb/s"
    return f"{text}; the backend's all_reduce: {own}"


def _rates(costs: Costs, rows: int) -> str:
    from ..parallel.forecast import communication_share

    sites = [
        f"{site} {1e3 * r.half_block(rows):.3f} ms ({1e3 * r.fixed_s:.3f} + {1e6 * r.row_s:.2f} us a row)"
        for site, r in costs.rates.items()
    ]
    share = communication_share(rows, costs)
    return f"  half-blocks: {', '.join(sites)}; exact sums take {share:.0%} of the modelled time"


def _table(choice: Choice, say: Callable[[str], None]) -> None:
    base = next(t for t in choice.trials if t.candidate.is_baseline)
    assert base.measured_s is not None
    measured = [t for t in choice.trials if t.measured_s is not None]
    others = [t for t in choice.trials if t.measured_s is None]
    say(f"  {'model ms':>9} {'ms':>9} {'x exact':>7} {'MB sent':>8}  policy")
    for t in sorted(measured, key=lambda t: t.measured_s or 0.0):
        ms, gain = 1e3 * (t.measured_s or 0.0), base.measured_s / (t.measured_s or 1.0)
        say(f"  {1e3 * t.modelled_s:9.2f} {ms:9.2f} {gain:7.2f} {1e-6 * t.wire_bytes:8.3f}  {t.candidate}")
    if others:
        least = 1e3 * min(t.modelled_s for t in others)
        say(f"  {least:9.2f} {'':9} {'':7} {'':8}  or more: {len(others)} others, not measured")
