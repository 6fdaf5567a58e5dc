"""Measures tiles of the attention kernel on the GPU at hand: what `fastattn tune` does, and nothing else.

For each need, a call that stands for it runs by every candidate that the GPU's shared memory holds. A
candidate that does not compile is passed over; one whose result differs from the shipped tile's is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from ..attention import build_args
from ..spec import AttentionArgs
from . import tuned
from .attention import run
from .device import Chip, chip
from .plan import Plan, can_specialize, plan
from .tiles import TILES, Need, Tile, chip_class, tile


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
    shipped_seconds: float  # by the tile that served before
    tried: int


def search(device: torch.device, needs: list[Need], sizes: Sizes, rounds: int = 15) -> Iterator[Found]:
    """The fastest tile for each need. Raises RuntimeError when tiles disagree about a result."""
    here = chip(device)
    for need in needs:
        a = _call(need, sizes, device)
        shipped = plan(a, here)
        expected = run(a, shipped)[0].float()
        plans = [shipped, *(p for p in _candidates(a, shipped, need, here) if _agrees(a, p, expected))]
        times = _times(a, plans, rounds)
        best = min(range(len(plans)), key=times.__getitem__)
        served = tuned.load(here).get(need) or tile(here, need)
        chosen = plans[best].tile if best else served
        if best and need.decode:  # not what block_m was cut to for few rows
            chosen = chosen._replace(block_m=served.block_m)
        yield Found(need, chosen, times[best], times[0], len(plans))


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


def _candidates(a: AttentionArgs, shipped: Plan, need: Need, c: Chip) -> Iterator[Plan]:
    heights = (shipped.tile.block_m,) if need.decode else (32, 64, 128)
    row = (a.k.shape[-1] + a.v.shape[-1]) * a.k.element_size()
    for block_m, block_n, warps, stages in product(heights, (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)):
        held = block_m * a.q.shape[-1] * a.q.element_size() + block_n * row * max(1, stages - 1)
        if held > c.shared_bytes:
            continue
        p = shipped._replace(tile=Tile(block_m, block_n, warps, stages))
        if p != shipped:
            yield p
        if can_specialize(a, p, c):
            yield p._replace(tile=p.tile._replace(specialize=True), specialize=True)


def _agrees(a: AttentionArgs, p: Plan, expected: Tensor) -> bool:
    """Whether the plan runs here. Raises RuntimeError when it computes something else."""
    try:
        got = run(a, p)[0].float()
    except (TritonError, RuntimeError):  # out of resources, ptxas; the latter: a pass that failed
        return False
    error = float((got - expected).abs().max())
    if not error <= 16 * torch.finfo(a.q.dtype).eps * max(1.0, float(expected.abs().max())):
        raise RuntimeError(f"{p} is {error:.3g} off the shipped tile's result: please report this")
    return True


def _times(a: AttentionArgs, plans: list[Plan], rounds: int) -> list[float]:
    """Median seconds of each plan; rounds alternate, so that all see the same clock."""
    samples = [[_seconds(a, p) for p in plans] for _ in range(rounds)]
    return [median(column) for column in zip(*samples, strict=True)]


def _seconds(a: AttentionArgs, p: Plan) -> float:
    if a.q.device.type != "cuda":
        begin = perf_counter()
        run(a, p)
        return perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(a, p)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
