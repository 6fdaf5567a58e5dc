"""Figures of the benchmarks (matplotlib, in the extra `bench`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from typing import Any

from .records import Record

Curve = dict[int, float]


def figure(panels: int, rows: int = 1) -> tuple[Any, Any]:
    """A figure with ``panels`` axes side by side (``rows`` times), drawn without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    size = (6 * panels, 7 * rows)
    drawing, axes = pyplot.subplots(rows, panels, figsize=size, layout="constrained", squeeze=False)
    return drawing, axes.flatten()


def draw(ax: Any, curves: dict[str, Curve], x_label: str, y_label: str, *, log_y: bool = False) -> None:
    """One line a curve over logarithmic x, the legend below."""
    for name, curve in sorted(curves.items()):
        xs = sorted(curve)
        ax.plot(xs, [curve[x] for x in xs], "--" if name.startswith("limit") else "o-", label=name)
    ax.set_xscale("log", base=2)
    ticks = sorted({x for curve in curves.values() for x in curve})
    ax.set_xticks(ticks, [str(x) for x in ticks])
    ax.minorticks_off()
    ax.set(xlabel=x_label, ylabel=y_label)
    if log_y:
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, None)
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def by(records: Sequence[Record], metric: str, variable: str) -> dict[str, Curve]:
    """Curves of ``metric`` over the ``variable=N`` of the cases; a peer's values are a curve of their own.

    Labels leave out what all cases have in common.
    """
    chosen = [r for r in records if r.metric == metric and f"{variable}=" in r.case]
    words = [r.case.split() for r in chosen]
    common = set(words[0]).intersection(*words[1:]) if words else set()
    curves: dict[str, Curve] = defaultdict(dict)
    for r in chosen:
        parts = dict(word.split("=") for word in r.case.split() if "=" in word)
        x = int(parts[variable])
        rest = " ".join(w for w in r.case.split() if w not in common and not w.startswith(f"{variable}="))
        curves[f"fastattn {rest}"][x] = r.ours
        if r.peer_value is not None:
            curves[f"{r.peer} {rest}"][x] = r.peer_value
        if r.limit_value is not None:
            curves[f"limit: {r.limit} {rest}"][x] = r.limit_value
    return dict(curves)


def varied(records: Sequence[Record], variables: Sequence[str]) -> str:
    """The first of ``variables`` that has several values in the cases; else the first."""
    for variable in variables:
        values = {w for r in records for w in r.case.split() if w.startswith(f"{variable}=")}
        if len(values) > 1:
            return variable
    return variables[0]


def llm(records: Sequence[Record], path: str) -> None:
    """Throughput over the batch size and TTFT over the input length, or over the one that varies."""
    drawing, (left, right) = figure(2)
    for ax, metric, unit, first, second in (
        (left, "throughput", "tokens/s", "batch", "input"),
        (right, "TTFT", "TTFT (ms)", "input", "batch"),
    ):
        variable = varied(records, (first, second))
        label = {"batch": "batch size", "input": "input tokens"}[variable]
        draw(ax, by(records, metric, variable), label, unit)
    drawing.savefig(path, dpi=130)


def attention(records: Sequence[Record], path: str) -> None:
    """Rate of decode and prefill over the number of keys."""
    drawing, (left, right) = figure(2)
    draw(left, by(records, "bandwidth", "keys"), "keys", "GB/s")
    draw(right, by(records, "rate", "keys"), "keys", "GFLOP/s")
    drawing.savefig(path, dpi=130)


def quant(records: Sequence[Record], path: str) -> None:
    """Time of a linear layer over the rows of x."""
    drawing, (ax,) = figure(1)
    draw(ax, by(records, "time", "rows"), "rows of x", "ms", log_y=True)
    drawing.savefig(path, dpi=130)


def collectives(records: Sequence[Record], path: str) -> None:
    """Time over the size, a row of panels each number of ranks and a panel each link."""
    times = [r for r in records if r.metric == "time"]
    blocks = list(dict.fromkeys(tuple(r.case.split()[:2]) for r in times))  # link, ranks
    columns = list(dict.fromkeys(link for link, _ in blocks))
    rows = list(dict.fromkeys(ranks for _, ranks in blocks))
    drawing, axes = figure(len(columns), len(rows))
    for ax, (ranks, link) in zip(axes, product(rows, columns), strict=True):
        curves: dict[str, Curve] = defaultdict(dict)
        for r in times:
            if r.case.split()[:2] == [link, ranks]:
                words = dict(word.split("=", 1) for word in r.case.split() if "=" in word)
                size = int(words["bytes"])
                curves[words["policy"]][size] = r.ours
                curves[r.peer][size] = r.peer_value or 0.0
        draw(ax, dict(curves), "bytes", "ms", log_y=True)
        ax.set_title(f"{link}, {ranks}")
    drawing.savefig(path, dpi=130)
