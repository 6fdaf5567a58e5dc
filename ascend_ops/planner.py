from __future__ import annotations
from typing import NamedTuple
from .chips import Chip
class PrefillTiles(NamedTuple):
    block_q: int
    block_k: int
    edge_k: int
class DecodeTiles(NamedTuple):
    block_r: int
    block_k: int
def padded(d): return max(16, 1 << (d - 1).bit_length())
def prefill_tiles(chip, head_dim, v_head_dim, page, *, band, biased):
    e = 128
    while page and page % e: e //= 2
    return PrefillTiles(64, 512 if not page else e, e)
def decode_tiles(chip, head_dim, v_head_dim, rows, page):
    e = 256
    while page and page % e: e //= 2
    return DecodeTiles(padded(rows), e)
