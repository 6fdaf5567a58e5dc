"""One rank of bench/planner.py: the planner's choice, then every candidate, then the fastest again."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import fastattn
from fastattn.models.generate import Model
from fastattn.models.trial import Trials
from fastattn.parallel import measure
from fastattn.parallel.candidates import candidates
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.parallel.planner import Trial, by_time, choose, costs, forecasts, measure_all
from fastattn.spec import Link, Phase, TPGroup

from .args import link_name
from .table import Column, Table
from .timing import summarize

TIMEOUT_S = 120.0
FINALISTS = 5
TABLE = Table(
    [
        Column("link", 14), Column("ranks", 5, "d"), Column("phase", 7), Column("ms", 8, ".2f"),
        Column("exact ms", 8, ".2f"), Column("best ms", 8, ".2f"), Column("x exact", 7, ".2f"),
        Column("off best", 8, ".2f"), Column("model", 6, ".2f"), Column("choice", 40), Column("best", 40),
    ]
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Everything of one network; rank 0 prints the rows and writes them to ``args.result``."""
    g = init(TIMEOUT_S)
    set_threads(g, args.threads)
    model = fastattn.load(args.model, dtype=args.inference_data_type, tp=g)
    trials = Trials(first_layers(model, args.layers), args.prefill_tokens, args.batch)
    link = measure.link(g)
    rows = [_phase(g, args, phase, trials, link) for phase in args.phase]
    if g.rank == 0:
        Path(args.result).write_text(json.dumps(rows))
    assert shutdown(g)


def first_layers(model: Model, count: int) -> Model:
    """The model without its later layers."""
    count = min(count, model.config.num_layers)
    config = replace(model.config, num_layers=count, windows=model.config.windows[:count])
    model.decoder.config, model.decoder.blocks = config, model.decoder.blocks[:count]
    return replace(model, config=config)


def _phase(
    g: TPGroup, args: argparse.Namespace, phase: Phase, trials: Trials, link: Link
) -> dict[str, float | str]:
    config, dtype, rows = trials.model.config, trials.model.dtype, trials.rows(phase)
    measured = costs(g, trials, phase, link, config.hidden_size, dtype)
    found = candidates(phase, rows[0], config.num_layers, g, dtype.itemsize)
    choice = choose(g, trials, phase, found, measured, args.budget)
    chosen = choice.trial.candidate
    every = forecasts(found if chosen in found else [*found, chosen], rows, measured)
    measure_all(g, trials, phase, every, 2 * args.budget, prune=True)
    if g.rank == 0 and args.verbose:
        _show(every)
    by_model = every[0]
    finalists = [
        Trial(t.candidate, t.modelled_s, t.wire_bytes)
        for t in every
        if t in by_time(every)[:FINALISTS]
        or t.candidate in (chosen, by_model.candidate)
        or t.candidate.is_baseline
    ]
    measure_all(g, trials, phase, finalists, 2 * args.budget, prune=False, least=7)
    ours, exact, model = (
        next(t for t in finalists if t.candidate == c)
        for c in (chosen, next(c for c in found if c.is_baseline), by_model.candidate)
    )
    best = by_time(finalists)[0]
    ms, exact_ms, best_ms, model_ms = (1e3 * (t.measured_s or 0.0) for t in (ours, exact, best, model))
    if g.rank == 0:
        shown = (ms, exact_ms, best_ms, exact_ms / ms, ms / best_ms, model_ms / best_ms)
        names = (str(chosen), str(best.candidate))
        print(TABLE.row(link_name(args.link[0]), g.world, phase, *shown, *names), flush=True)
    return {
        "phase": phase, "choice": str(chosen), "best": str(best.candidate), "ms": ms, "exact_ms": exact_ms,
        "best_ms": best_ms, "spread": summarize(ours.samples).spread,
    }  # fmt: skip


def _show(every: list[Trial]) -> None:
    print(f"{'model ms':>10} {'ms':>10}  candidate")
    for t in by_time(every):
        print(f"{1e3 * t.modelled_s:10.3f} {1e3 * (t.measured_s or 0.0):10.3f}  {t.candidate}")
