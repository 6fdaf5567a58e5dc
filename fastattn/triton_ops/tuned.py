"""Tiles that `fastattn tune` measured on this machine's GPUs, kept in the user's cache folder.

One JSON file for each kind of GPU and versions of Triton and of the kernels. A file that cannot be read, or
says what no tile is, counts as absent: the shipped table serves.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import triton

from cuda_volta.cache import digest, user_folder

from .. import __version__
from .device import Chip
from .tiles import Need, Tile


def file(chip: Chip) -> Path:
    """Where the tiles of a kind of GPU are kept."""
    return user_folder() / "triton-tiles" / f"{digest(chip.name, triton.__version__, __version__)}.json"


@cache
def load(chip: Chip) -> Mapping[Need, Tile]:
    """The tiles measured on such a GPU; read once in a process."""
    try:
        stored = json.loads(file(chip).read_text())
        return {Need(*entry["need"]): _tile(*entry["tile"]) for entry in stored["entries"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def save(chip: Chip, tiles: Mapping[Need, Tile]) -> Path:
    """Adds tiles to those of such a GPU, in place of older ones for the same need; returns the file."""
    load.cache_clear()
    entries = [{"need": list(n), "tile": list(t)} for n, t in sorted({**load(chip), **tiles}.items())]
    text = json.dumps({"chip": chip.name, "triton": triton.__version__, "entries": entries}, indent=1)
    path = file(chip)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-", delete=False) as new:
        new.write(text)
    os.replace(new.name, path)  # readers see the old file or the new one  # noqa: PTH105
    load.cache_clear()
    return path


def _tile(block_m: int, block_n: int, num_warps: int, num_stages: int, specialize: bool) -> Tile:
    """Raises ValueError for numbers that Triton would not take."""
    blocks_fit = all(type(n) is int and 16 <= n <= 256 and n & (n - 1) == 0 for n in (block_m, block_n))
    if not blocks_fit or num_warps not in (1, 2, 4, 8, 16) or num_stages not in range(1, 9):
        raise ValueError(f"tile: {block_m}x{block_n}, {num_warps} warps, {num_stages} stages")
    return Tile(block_m, block_n, num_warps, num_stages, bool(specialize))
