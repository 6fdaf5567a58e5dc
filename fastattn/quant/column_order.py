"""In which order GPTQ visits the columns of a matrix, and which group each column belongs to.

GPTQ pushes the rounding error of a column onto the columns it has not visited yet. Act-order visits the
columns with the largest inputs first, while most others can still make up for them, and fills the groups in
that order: more accurate, but the groups' columns lie scattered (``g_idx``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grouped import trivial_g_idx


class ColumnOrder(NamedTuple):
    """``visit``: int64 (in,), columns in the order they are quantized; ``g_idx``: int32 (in,)."""

    visit: Tensor
    g_idx: Tensor


def by_position(columns: int, group_size: int) -> ColumnOrder:
    """Columns and groups as they lie in the matrix; the last group may be shorter."""
    return ColumnOrder(torch.arange(columns), trivial_g_idx(columns, group_size))


def by_activation(energy: Tensor, group_size: int) -> ColumnOrder:
    """Act-order: columns of the largest ``energy`` (in,), the Hessian's diagonal, first; groups likewise."""
    visit = _descending(energy)
    return ColumnOrder(visit, trivial_g_idx(len(visit), group_size)[_inverse(visit)])


def by_group(energy: Tensor, group_size: int) -> ColumnOrder:
    """Groups as they lie in the matrix, visited by their energy, and the columns within them too.

    Most of what act-order gains, at no cost at run time. GPTQ's static groups are the same idea, but fix all
    scales before the first column; here they are fitted to what is left when a group is reached.
    """
    return _group_by_group(energy, trivial_g_idx(len(energy), group_size))


def within_heads(energy: Tensor, group_size: int, num_heads: int, num_kv_heads: int) -> ColumnOrder:
    """Act-order for an attention output projection whose groups can be sorted at no cost at run time.

    ``argsort(g_idx, stable)`` then permutes columns inside each head only, in the same way for all query
    heads of one KV head: the one kind of permutation that can be moved into the rows of v_proj, because a
    row of V is mixed by one softmax and shared by those heads. Where heads hold no whole number of groups,
    none but the columns' own order is of that kind: `by_group`.
    """
    head_dim, sharing = len(energy) // num_heads, num_heads // num_kv_heads
    if group_size < 1 or head_dim % group_size:
        return by_group(energy, group_size)
    shared = energy.view(num_kv_heads, sharing, head_dim).sum(1)
    rank = torch.stack([_inverse(_descending(e)) for e in shared]).repeat_interleave(sharing, 0)
    place = (torch.arange(num_heads)[:, None] * head_dim + rank).flatten()
    return _group_by_group(energy, trivial_g_idx(len(energy), group_size)[place])


def _group_by_group(energy: Tensor, g_idx: Tensor) -> ColumnOrder:
    group = g_idx.long()
    total = energy.new_zeros(int(group.max()) + 1).index_add_(0, group, energy)
    turn = _inverse(_descending(total))[group]
    columns = _descending(energy)
    return ColumnOrder(columns[turn[columns].argsort(stable=True)], g_idx)


def _descending(x: Tensor) -> Tensor:
    return x.argsort(descending=True, stable=True)


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation))
    return inverse
