"""Tiles for a chip and a call: the fewest Cube-Vector synchronisations that the memories hold.

Cube and Vector cores of an Ascend chip exchange data through global memory (a 950's from memory to memory on
chip), and wait for each other at each of three crossings a block: scores one way, weights back, products one
way again. So the first-level tile is the one with the most scores in it (arXiv 2410.16663), of those that the
compiler accepts at its first try (`capacity`: with two buffers of everything, but for the 950); among equals
the one with the most queries, which reads K and V the fewest times. The second level, the cuts for L0A, L0B
and the vector registers, is the vendor compiler's.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from .capacity import PrefillShape, first_try
from .chips import Chip

_QUERIES = (256, 128, 64, 32, 16)
_SIZES = (1024, 512, 256, 128, 64, 32, 16)
#: Keys of an edge block: few, as the part of it that is hidden is computed in vain.
EDGE = 128
#: Scores of a decoding step: it reads memory, and larger blocks only wait longer for their first byte.
_DECODE_SCORES, _DECODE_BIASED_SCORES = 1 << 14, 1 << 12


class PrefillTiles(NamedTuple):
    """First-level tiles of `kernels.prefill`: queries, and keys of a full and of an edge block."""

    block_q: int
    block_k: int
    edge_k: int


class DecodeTiles(NamedTuple):
    """Tiles of `kernels.decode`: rows (queries of all heads of a KV head) and keys."""

    block_r: int
    block_k: int


def padded(n: int) -> int:
    """The power of two, 16 or more, that a dimension is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def edge_tiles(
    *, band: bool = False, mask_bytes: int = 0, alibi: bool = False, softcap: bool = False
) -> float:
    """Score matrices alive at once in an edge block: the scores, what is added to them, and its conversions.

    ``mask_bytes`` is the size of an element of the user's mask, 0 without one. As the vendor plans them.
    """
    if not (band or mask_bytes or alibi):
        return 1.5 + softcap * 0.5
    conversion = {0: 0.0, 1: 2.0, 2: 0.5, 4: 0.0}[mask_bytes]
    return 2.0 + max(conversion, 0.25 * alibi) + softcap


def prefill_tiles(
    chip: Chip,
    head_dim: int,
    v_head_dim: int,
    page: int = 0,
    *,
    edge: float = 2.0,
    biased: bool = False,
    softcap: bool = False,
) -> PrefillTiles:
    """The tiles of a prefill call.

    Args:
        page: tokens of a page, 0 without pages; a block lies within one.
        edge: of `edge_tiles`. biased: with ALiBi or a mask, so that every block is an edge block.
    """
    whole = _divisor(page) if page else max(_SIZES)
    able = []
    for block_q, block_k in product(_QUERIES, (*_SIZES, *(n for n in (8, 4, 2, 1) if page))):
        if block_k > whole or (page and not biased and block_k > EDGE):
            continue
        tiles = PrefillTiles(block_q, block_k, block_k if biased else min(EDGE, block_k))
        shape = PrefillShape(*tiles, padded(head_dim), padded(v_head_dim), edge, softcap)
        if not first_try(shape, chip).overflows(chip):
            able.append(tiles)
    return max(able, key=lambda tiles: (tiles.block_q * tiles.block_k, tiles.block_q))


def decode_tiles(
    chip: Chip, head_dim: int, v_head_dim: int, rows: int, page: int = 0, *, biased: bool = False
) -> DecodeTiles:
    """The tiles of a decoding call; ``rows`` as `DecodeTiles` has them."""
    block_r = padded(rows)
    block_k = (_DECODE_BIASED_SCORES if biased else _DECODE_SCORES) // block_r
    block_k = min(block_k, 512, _divisor(page) if page else 512)
    while first_try(
        PrefillShape(block_r, block_k, block_k, padded(head_dim), padded(v_head_dim)), chip
    ).overflows(chip):
        block_k //= 2
    return DecodeTiles(block_r, block_k)


def _divisor(page: int) -> int:
    """The largest power of two that divides a page."""
    return page & -page
