"""Measures tiles of the linear kernels on the GPU at hand; `tune` does so for attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, product
from typing import NamedTuple

import torch
from torch import Tensor

from ..quant import packed
from ..spec import PackedWeight
from . import tuned
from .device import Chip, chip
from .linear_few import run_few
from .linear_many import run_many
from .linear_tiles import LINEAR_TILES, MANY, LinearNeed, LinearTile, linear_tile
from .tiles import chip_class
from .tune_times import agreeing, times


class Sizes(NamedTuple):
    """Of the calls that stand for needs."""

    out: int = 8192
    inn: int = 8192
    many: int = 1024  # rows of x of the kernel for many
    group: int = 128
    distinct_bytes: int = 400 << 20  # of copies of W that few rows cycle through: 8 times an H100's L2


class Found(NamedTuple):
    """The outcome for one need."""

    need: LinearNeed
    tile: LinearTile
    seconds: float
    served_seconds: float  # by the tile that served before
    tried: int


def search(device: torch.device, needs: list[LinearNeed], sizes: Sizes, rounds: int = 15) -> Iterator[Found]:
    """The fastest tile for each need. Raises RuntimeError when tiles disagree about a result."""
    here = chip(device)
    for need in needs:
        served = tuned.load(here).linear.get(need) or linear_tile(here, need)
        assert served is not None  # `all_needs` names no other
        run = run_many if need.rows == MANY else run_few
        x, weights = operands(need, sizes, device)
        expected = run(x, weights[0], served).float()
        named = ((t, partial(run, x, weights[0], t)) for t in candidates(served, need, here))
        tiles = [t for t, _ in agreeing(named, expected) if isinstance(t, LinearTile)]
        tiles.insert(0, served)
        turn = cycle(weights)
        taken = times([_on_next(run, x, turn, t) for t in tiles], device, rounds)
        best = min(range(len(tiles)), key=taken.__getitem__)
        yield Found(need, tiles[best], taken[best], taken[0], len(tiles))


def all_needs(here: Chip) -> list[LinearNeed]:
    """What the shipped table of a chip has an entry for."""
    return [LinearNeed(rows, bits) for bits in (4, 8) for rows in LINEAR_TILES[chip_class(here.capability)]]


def _on_next(
    run: Callable[[Tensor, PackedWeight, LinearTile], Tensor], x: Tensor, turn: Iterator[PackedWeight],
    t: LinearTile,
) -> Callable[[], Tensor]:  # fmt: skip
    return lambda: run(x, next(turn), t)


def operands(need: LinearNeed, s: Sizes, device: torch.device) -> tuple[Tensor, list[PackedWeight]]:
    """x, and so many copies of W that few rows find none in a cache."""
    scales = torch.rand(s.out, s.inn // s.group, device=device).half() * 0.01 + 0.001
    q = torch.randint(0, 16, (s.out, s.inn), dtype=torch.uint8, device=device)
    if need.bits == 4:
        w = packed.pack_int4(q, scales, -8 * scales, s.group)
    else:
        w = packed.pack_int8(q.to(torch.int8) - 8, scales, None, s.group)
    size = sum(t.nbytes for t in w.tensors.values())
    copies = 1 if need.rows == MANY else -(-s.distinct_bytes // size)
    others = [w._replace(tensors={n: t.clone() for n, t in w.tensors.items()}) for _ in range(copies - 1)]
    rows = s.many if need.rows == MANY else need.rows
    return torch.randn(rows, s.inn, dtype=torch.float16, device=device), [w, *others]


def candidates(served: LinearTile, need: LinearNeed, c: Chip) -> Iterator[LinearTile]:
    """Tiles whose operands in flight fit the shared memory."""
    many = need.rows == MANY
    heights = (64, 128, 256) if many else (need.rows,)
    for block_m, block_n, block_k in product(heights, (32, 64, 128, 256), (64, 128)):
        step = 2 * block_m * block_k + block_n * block_k * need.bits // 8
        for num_warps, num_stages in product((4, 8), (2, 3, 4, 5)):
            t = LinearTile(block_m, block_n, block_k, num_warps, num_stages)
            held_in_registers = block_m * block_n // (32 * num_warps)
            if t != served and step * (num_stages - 1) <= c.shared_bytes and held_in_registers <= 128:
                yield t
