"""One rank of bench/tp_aware.py: a pair of act-order layers, column-parallel then row-parallel."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.collectives.exchange import all_reduce, gather_last
from fastattn.parallel.act_order import LAYOUTS, Align, ffn_cuts
from fastattn.parallel.group import init, set_threads, shutdown
from fastattn.parallel.linear import ColumnLinear, RowLinear
from fastattn.parallel.shard import plan
from fastattn.quant import grouped
from fastattn.quant.gptq import Gptq
from fastattn.quant.words import num_words
from fastattn.spec import Cut, PackedWeight, Shard, TPGroup

from .args import DTYPES
from .meeting import Meeting
from .timing import Timing, interleave, summarize

FORMAT = Gptq(4, 128, act_order=True, zeros="v1")
GATHER, PERMUTE = "AllGather", "permutation"
TIMEOUT_S = 120.0
ROUNDS = (7, 60)  # at least and at most


class Pair(NamedTuple):
    """(K1, N1, N2): W1 is (N1, K1), W2 is (N2, N1)."""

    inn: int
    between: int
    out: int


@dataclass(frozen=True)
class Dims:
    """`shard.Dims` of a pair: as many heads and tokens as ranks, so that only the MLP decides."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    head_dim: int = 1


@dataclass(frozen=True)
class Row:
    """Medians over the rounds, in ms, of each layout and each step of ``naive``; metadata in bytes."""

    rows: int
    rounds: int
    ms: dict[str, float]
    spread: dict[str, float]
    metadata: dict[str, int]  # scales, zeros and orders of W2 on rank 0


def random_matrix(out: int, inn: int, seed: int) -> dict[str, Tensor]:
    """Random symmetric 4-bit weights of groups of 128 with act-order, as GPTQ stores them."""
    rng = torch.Generator().manual_seed(seed)
    shapes = FORMAT.shapes(out, inn)
    words = torch.iinfo(torch.int32)
    order = torch.randperm(inn, generator=rng)
    return {
        "qweight": torch.randint(words.min, words.max, shapes["qweight"], generator=rng, dtype=torch.int32),
        "qzeros": torch.full((shapes["qzeros"][0], num_words(out, 4)), 0x77777777, dtype=torch.int32),
        "scales": ((torch.rand(shapes["scales"], generator=rng) + 0.5) / (8 * inn**0.5)).half(),
        "g_idx": grouped.trivial_g_idx(inn, FORMAT.group_size)[order],
    }


class Layers:
    """This rank's pieces of the pair in one layout."""

    def __init__(
        self, g: TPGroup, layout: str, pair: Pair, first: dict[str, Tensor], second: dict[str, Tensor]
    ) -> None:
        dims = Dims(pair.inn, pair.between, g.world, g.world, g.world)
        shards = plan(dims, g.world, align=FORMAT.group_size)
        self.spans = [m.ffn for m in shards]
        rows, columns = ffn_cuts(shards[g.rank], dims, second["g_idx"], layout)
        self.group = g
        self.first = ColumnLinear(_load(first, rows))
        self.second = RowLinear(_load(second, columns._replace(out=Cut(pair.out))))
        self.align = Align(g, second["g_idx"], self.spans) if layout == "naive" else None

    def __call__(self, x: Tensor) -> Tensor:
        """Algorithm 2 or 3 of 2402.04925, or the local-sort form: (rows, K1) to (rows, N2)."""
        y = self.first(x)
        y = self.second(y if self.align is None else self.align(y))
        all_reduce(self.group, y, "end of the pair").wait()
        return y

    def metadata(self) -> int:
        """Bytes of the second weight that are not its integers."""
        w = self.second.weight
        orders = [t for t in (w.g_idx, w.x_perm) if t is not None]
        return sum(t.nbytes for n, t in w.tensors.items() if n != "codes") + sum(t.nbytes for t in orders)


def _load(tensors: dict[str, Tensor], s: Shard) -> PackedWeight:
    return grouped.pack(FORMAT.read(tensors, s.out, s.inn))


def run(args: argparse.Namespace) -> None:
    """Measures with the group that the launcher's environment describes; rank 0 writes the rows."""
    g = init(timeout_s=TIMEOUT_S)
    set_threads(g, args.threads)
    pair, dtype = Pair(*map(int, args.one.split("x"))), DTYPES[args.data_type]
    first, second = random_matrix(pair.between, pair.inn, 1), random_matrix(pair.out, pair.between, 2)
    layers = {layout: Layers(g, layout, pair, first, second) for layout in LAYOUTS}
    del first, second
    with torch.inference_mode():
        rows = [_measure(g, layers, pair, m, dtype, args.budget) for m in args.rows]
    if g.rank == 0:
        Path(args.result).write_text(json.dumps([asdict(row) for row in rows]))
    shutdown(g)


def _measure(
    g: TPGroup, layers: dict[str, Layers], pair: Pair, m: int, dtype: torch.dtype, budget: float
) -> Row:
    x = torch.randn(m, pair.inn, generator=torch.Generator().manual_seed(m)).to(dtype)
    _check({name: layer(x).float() for name, layer in layers.items()}, f"{m} rows")
    align = layers["naive"].align
    assert align is not None
    local = layers["naive"].first(x)
    whole = torch.randn(m, pair.between).to(dtype)
    steps: dict[str, Callable[[], object]] = {
        **{name: (lambda layer=layer: layer(x)) for name, layer in layers.items()},  # type: ignore[misc]
        GATHER: lambda: gather_last(g, local, align.sizes, GATHER, everywhere=True),
        PERMUTE: lambda: whole.index_select(1, align.order),
    }
    meeting = Meeting(g)

    def together(step: Callable[[], object]) -> Callable[[], float]:
        def run() -> None:
            meeting.begin()
            step()

        return meeting.timed(run)

    runs = {name: together(step) for name, step in steps.items()}
    begin = perf_counter()
    interleave(runs, 1, 0)
    rounds = meeting.same(int(min(max(budget / (perf_counter() - begin), ROUNDS[0]), ROUNDS[1])))
    found: dict[str, Timing] = {
        name: summarize(meeting.slowest(taken)) for name, taken in interleave(runs, rounds, 1).items()
    }
    return Row(
        m, rounds,
        {name: 1e3 * t.median for name, t in found.items()},
        {name: t.spread for name, t in found.items()},
        {name: layer.metadata() for name, layer in layers.items()},
    )  # fmt: skip


def _check(results: dict[str, Tensor], where: str) -> None:
    """Ends the program unless all layouts give the same."""
    expected = results["tp_aware"]
    for name, found in results.items():
        apart = float((found - expected).abs().max() / expected.abs().max())
        if not apart < 0.02:
            raise SystemExit(f"{name}, {where}: {apart:.3g} of the largest value off")
