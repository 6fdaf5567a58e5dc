"""Measures tiles of the attention kernel on the GPU at hand; `tune_linear` does so for the linear ones.

For each need, a call that stands for it runs by every candidate that the GPU's shared memory holds. A
candidate that does not compile is passed over; one whose result differs from the shipped tile's is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import build_args
from ..spec import AttentionArgs
from . import tuned
from .attention import run
from .device import Chip, chip
from .plan import Plan, can_specialize, plan
from .tiles import TILES, Need, Tile, chip_class, tile
from .tune_times import agreeing, times


class Sizes(NamedTuple):
    """Of the calls that stand for needs."""

    heads: int = 32
    kv_heads: int = 8
    prefill: int = 4096  # queries and keys, causal
    batch: int = 8  # of decode
    keys: int = 16384  # of decode


class Found(NamedTuple):
    """The outcome for one need."""

    need: Need
    tile: Tile
    seconds: float
    served_seconds: float  # by the tile that served before
    tried: int


def search(device: torch.device, needs: list[Need], sizes: Sizes, rounds: int = 15) -> Iterator[Found]:
    """The fastest tile for each need. Raises RuntimeError when tiles disagree about a result."""
    here = chip(device)
    for need in needs:
        a = _call(need, sizes, device)
        before = plan(a, here)
        named = ((p, partial(_out, a, p)) for p in _candidates(a, before, need, here))
        found = agreeing(named, run(a, before)[0].float())
        plans = [before, *(p for p, _ in found if isinstance(p, Plan))]
        taken = times([partial(_out, a, p) for p in plans], device, rounds)
        best = min(range(len(plans)), key=taken.__getitem__)
        served = tuned.load(here).attention.get(need) or tile(here, need)
        chosen = plans[best].tile if best else served
        if best and need.decode:  # not what block_m was cut to for few rows
            chosen = chosen._replace(block_m=served.block_m)
        yield Found(need, chosen, taken[best], taken[0], len(plans))


def _out(a: AttentionArgs, p: Plan) -> Tensor:
    return run(a, p)[0]


def all_needs(here: Chip, itemsizes: tuple[int, ...] = (2,)) -> list[Need]:
    """What the shipped table of a chip has an entry for."""
    return [Need(*n) for n in TILES[chip_class(here.capability)] if n[2] in itemsizes]


def _call(need: Need, s: Sizes, device: torch.device) -> AttentionArgs:
    # Turing has no bfloat16, and float16 takes the same time elsewhere.
    dtype = torch.float16 if need.itemsize == 2 else torch.float32

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, need.width, dtype=dtype, device=device)

    if need.decode:
        k, v = (tensor(s.batch, s.keys, s.kv_heads) for _ in range(2))
        return build_args(tensor(s.batch, 1, s.heads), k, v)
    k, v = (tensor(1, s.prefill, s.kv_heads) for _ in range(2))
    return build_args(tensor(1, s.prefill, s.heads), k, v, causal=True)


def _candidates(a: AttentionArgs, before: Plan, need: Need, c: Chip) -> Iterator[Plan]:
    heights = (before.tile.block_m,) if need.decode else (32, 64, 128)
    row = (a.k.shape[-1] + a.v.shape[-1]) * a.k.element_size()
    for block_m, block_n, warps, stages in product(heights, (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        held = block_m * a.q.shape[-1] * a.q.element_size() + block_n * row * max(1, stages - 1)
        if held > c.shared_bytes:
            continue
        p = before._replace(tile=Tile(block_m, block_n, warps, stages))
        if p != before:
            yield p
        if can_specialize(a, p, c):
            yield p._replace(tile=p.tile._replace(specialize=True), specialize=True)
