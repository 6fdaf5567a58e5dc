"""Tiles that `fastattn tune` measured on this machine's GPUs, kept in the user's cache folder.

One JSON file for each kind of GPU and versions of Triton and of the kernels. A file that cannot be read, or
says what no tile is, counts as absent: the shipped tables serve.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton

from cuda_volta.cache import digest, user_folder

from .. import __version__
from .device import Chip
from .linear_tiles import LinearNeed, LinearTile
from .tiles import Need, Tile


class Tuned(NamedTuple):
    """The tiles measured on one kind of GPU."""

    attention: Mapping[Need, Tile] = {}
    linear: Mapping[LinearNeed, LinearTile] = {}


def file(chip: Chip) -> Path:
    """Where the tiles of a kind of GPU are kept."""
    return user_folder() / "triton-tiles" / f"{digest(chip.name, triton.__version__, __version__)}.json"


@cache
def load(chip: Chip) -> Tuned:
    """The tiles measured on such a GPU; read once in a process."""
    try:
        stored = json.loads(file(chip).read_text())
        return Tuned(
            {Need(*need): _attention_tile(*tile) for need, tile in stored["attention"]},
            {LinearNeed(*need): _linear_tile(*tile) for need, tile in stored["linear"]},
        )
    except (OSError, ValueError, TypeError, KeyError):
        return Tuned()


def save(chip: Chip, new: Tuned) -> Path:
    """Adds tiles to those of such a GPU, in place of older ones for the same need; returns the file."""
    load.cache_clear()
    old = load(chip)
    facts: dict[str, Any] = {"chip": chip.name, "triton": triton.__version__}
    facts["attention"] = sorted({**old.attention, **new.attention}.items())
    facts["linear"] = sorted({**old.linear, **new.linear}.items())
    path = file(chip)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-", delete=False) as written:
        json.dump(facts, written, indent=1)
    os.replace(written.name, path)  # readers see the old file or the new one  # noqa: PTH105
    load.cache_clear()
    return path


def _attention_tile(block_m: int, block_n: int, num_warps: int, num_stages: int, specialize: bool) -> Tile:
    """Raises ValueError for numbers that Triton would not take."""
    _check((block_m, block_n), num_warps, num_stages)
    return Tile(block_m, block_n, num_warps, num_stages, bool(specialize))


def _linear_tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> LinearTile:
    """Raises ValueError for numbers that Triton would not take, or steps that are no pairs of halves."""
    _check((block_m, block_n, block_k), num_warps, num_stages)
    if block_k < 32:
        raise ValueError(f"tile: steps of {block_k} columns")
    return LinearTile(block_m, block_n, block_k, num_warps, num_stages)


def _check(blocks: tuple[int, ...], num_warps: int, num_stages: int) -> None:
    blocks_fit = all(type(n) is int and 16 <= n <= 256 and n & (n - 1) == 0 for n in blocks)
    if not blocks_fit or num_warps not in (1, 2, 4, 8, 16) or num_stages not in range(1, 9):
        raise ValueError(f"tile: {blocks}, {num_warps} warps, {num_stages} stages")
