"""Figures of the benchmarks (matplotlib, in the extra `bench`)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .records import Record

Curve = dict[int, float]


def figure(panels: int) -> tuple[Any, Any]:
    """A figure with ``panels`` axes side by side, drawn without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, panels, figsize=(6 * panels, 4.5), layout="constrained", squeeze=False)
    return drawing, axes[0]


def draw(ax: Any, curves: dict[str, Curve], x_label: str, y_label: str) -> None:
    """One line a curve, on logarithmic x."""
    for name, curve in sorted(curves.items()):
        xs = sorted(curve)
        style = "--" if "limit" in name else "o-"
        ax.plot(xs, [curve[x] for x in xs], style, label=name)
    ax.set_xscale("log", base=2)
    ticks = sorted({x for curve in curves.values() for x in curve})
    ax.set_xticks(ticks, [str(x) for x in ticks])
    ax.set(xlabel=x_label, ylabel=y_label, ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def by(records: Sequence[Record], metric: str, variable: str) -> dict[str, Curve]:
    """Curves of ``metric`` over the ``variable=N`` of the cases; a peer's values are a curve of their own."""
    curves: dict[str, Curve] = defaultdict(dict)
    for r in records:
        found = re.search(rf"\b{variable}=(\d+) ?", r.case)
        if r.metric != metric or found is None:
            continue
        rest = r.case.replace(found.group(0), "").strip()
        x = int(found.group(1))
        curves[f"fastattn: {rest}"][x] = r.ours
        if r.peer_value is not None:
            curves[f"{r.peer}: {rest}"][x] = r.peer_value
        if r.limit_value is not None:
            curves[f"limit: {rest}"][x] = r.limit_value
    return dict(curves)


def llm(records: Sequence[Record], path: str) -> None:
    """Throughput over the batch size, and TTFT over the input length."""
    drawing, (left, right) = figure(2)
    draw(left, by(records, "throughput", "batch"), "batch size", "tokens/s")
    draw(right, by(records, "TTFT", "input"), "input tokens", "TTFT (ms)")
    drawing.savefig(path, dpi=130)


def attention(records: Sequence[Record], path: str) -> None:
    """Rate of decode and prefill over the number of keys."""
    drawing, (left, right) = figure(2)
    draw(left, by(records, "bandwidth", "keys"), "keys", "GB/s")
    draw(right, by(records, "rate", "keys"), "keys", "GFLOP/s")
    drawing.savefig(path, dpi=130)
