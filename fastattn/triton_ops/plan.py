"""How an attention call is spread over a GPU: from shapes and bounds that the host knows, never values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton import next_power_of_2

from ..spec import AttentionArgs
from . import tuned
from .device import Chip
from .tiles import Need, Tile, tile

#: Rows of queries up to which a call is bound by reading keys: they fit one program.
DECODE_ROWS = 64
#: Pieces of a sequence's keys at most: `combine_kernel` holds one row of each.
MAX_SPLITS = 64
#: Keys that a piece has at least: below, its fixed costs outweigh what it reads.
SPLIT_KEYS = 128


class Plan(NamedTuple):
    """How a call is spread over programs."""

    tile: Tile
    pack: bool = False  # the query heads of a KV head share a program
    splits: int = 1  # pieces of a sequence's keys
    tma: bool = False  # keys and values come through tensor descriptors (Hopper's tensor memory accelerator)
    specialize: bool = False  # with it, queries too, and warps that load are apart from those that multiply


def plan(a: AttentionArgs, c: Chip) -> Plan:
    """The plan for a call on a chip."""
    group = a.q.shape[-2] // a.k.shape[-2]
    pack = group > 1 and a.max_seqlen_q * group <= DECODE_ROWS
    rows = a.max_seqlen_q * (group if pack else 1)
    wanted = need(a, rows)
    t = tuned.load(c).attention.get(wanted) or tile(c, wanted)
    p = _with_tile(a, c, t, rows, pack)
    # A tile for specialized warps is none for a call that cannot have them: four warps would hold it all.
    return _with_tile(a, c, tile(c, wanted), rows, pack) if t.specialize and not p.specialize else p


def _with_tile(a: AttentionArgs, c: Chip, t: Tile, rows: int, pack: bool) -> Plan:
    """The plan by a tile, cut to what the call has."""
    group = a.q.shape[-2] // a.k.shape[-2]
    t = t._replace(block_m=min(t.block_m, max(16, next_power_of_2(rows))))
    if a.attn_mask is not None:  # whose blocks and addresses take memory and registers too
        t = t._replace(block_m=max(16, t.block_m // 2), block_n=max(16, t.block_n // 2))
    programs = batch(a) * a.q.shape[-2] // (group if pack else 1) * -(-rows // t.block_m)
    splits = _splits(programs, _keys(a, rows), t.block_n, c.processors * _resident(a, t, c))
    p = Plan(t, pack, splits, c.tma and takes_descriptors(a, t))
    return p._replace(specialize=t.specialize and can_specialize(a, p, c))


def need(a: AttentionArgs, rows: int) -> Need:
    """What the tile of a call depends on; ``rows`` of queries that share a program's keys."""
    width = next_power_of_2(max(a.q.shape[-1], a.v.shape[-1], 64))
    return Need(rows <= DECODE_ROWS, width, max(a.q.element_size(), a.k.element_size()))


def batch(a: AttentionArgs) -> int:
    """Sequences of a call."""
    return a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.shape[0] - 1


def has_absent_keys(a: AttentionArgs) -> bool:
    """Whether k and v may hold rows past a sequence's last key, whatever they contain."""
    return a.cu_seqlens_k is not None or a.seqused_k is not None


def can_specialize(a: AttentionArgs, p: Plan, c: Chip) -> bool:
    """Whether Triton 3.6 can specialize the warps of a plan: it does on Hopper, for programs of four warps.

    They become two warpgroups that multiply, half of the rows each, and one that loads.
    """
    dense = a.cu_seqlens_q is None and a.attn_mask is None and not has_absent_keys(a)
    whole = not p.pack and p.splits == 1 and p.tile.num_warps == 4 and p.tile.block_m == 128
    return c.warpgroups and p.tma and dense and whole and a.q.element_size() == 2 and _rows(a.q)


def _rows(q: Tensor) -> bool:
    """Whether queries are rows of (heads * head_dim) whose heads a descriptor can cut out."""
    return q.is_contiguous() and _describable(q) and q.shape[-1] == next_power_of_2(q.shape[-1]) >= 16


def _keys(a: AttentionArgs, rows: int) -> int:
    """Upper bound of the keys that a program walks."""
    left, right = a.bounds()
    return a.max_seqlen_k if left is None or right is None else min(a.max_seqlen_k, left + right + rows)


def _resident(a: AttentionArgs, t: Tile, c: Chip) -> int:
    """Programs that a processor's shared memory holds, of two at most: two hide each other's waits."""
    row = (a.k.shape[-1] + a.v.shape[-1]) * a.k.element_size()
    return min(2, max(1, c.shared_bytes // (t.block_n * row * max(1, t.num_stages - 1))))


def _splits(programs: int, keys: int, block_n: int, slots: int) -> int:
    """Pieces that fill ``slots`` with programs: the fewest within 85 % of the fullest waves.

    The rule of flash-attention's ``num_splits_heuristic``.
    """
    if not programs or programs >= 0.8 * slots:
        return 1
    most = max(1, min(MAX_SPLITS, keys // max(SPLIT_KEYS, block_n)))
    filled = [(n * programs / slots) / -(-n * programs // slots) for n in range(1, most + 1)]
    return next(n for n, f in enumerate(filled, 1) if f >= 0.85 * max(filled))


def takes_descriptors(a: AttentionArgs, t: Tile) -> bool:
    """Whether keys and values can come through tensor descriptors: no block of keys may cross pages."""
    if a.block_table is not None and (a.k.shape[1] % t.block_n or a.cache_leftpad is not None):
        return False
    # In float32, where products are FMAs, operands that come so cost too many registers.
    halves = a.k.dtype == a.q.dtype and a.q.element_size() == 2
    return halves and _describable(a.k) and _describable(a.v)


def _describable(t: Tensor) -> bool:
    """Whether the hardware's descriptors can say where the tensor lies."""
    aligned = t.data_ptr() % 16 == 0 and all(
        s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1]
    )
    return aligned and t.numel() > 0 and t.stride(-1) == 1
