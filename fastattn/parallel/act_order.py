"""Act-order under tensor parallelism: which rows and columns each rank holds, and in which order.

GPTQ with act-order scatters the columns of a quantization group. Sorting the columns of a row-parallel
layer by group, ``P2 = argsort(g_idx)``, makes groups contiguous, so that a rank's slice has its own groups
only; but then the layer's input must come in that order. The layouts of a pair (column-parallel layer,
row-parallel layer), after TP-Aware Dequantization (2402.04925):

``tp_aware``    Algorithm 3. The rows of the column-parallel weight are put into the order P2 before both
                are cut: its output comes as the next layer wants it. Nothing happens between the GEMMs.
``naive``       Algorithm 2. Only the row-parallel weight is sorted; at run time the output of the first
                GEMM is gathered from all ranks, permuted by P2 and cut again (`Align`).
``local_sort``  Each rank cuts the stored order and sorts its own columns. No exchange either, but a rank's
                columns belong to all groups: it holds all scales and zeros, and permutes its input.

gate and up multiply element by element, so one P2 of down serves both. Between v and o lies attention,
which mixes the tokens of each head: there a permutation is legal only inside a head, and must be the same
for all query heads that read one KV head (`head_order`); otherwise o takes the form ``local_sort``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..collectives.exchange import gather_last
from ..quant.grouped import sorted_columns
from ..spec import Cut, Shard, Span, TPGroup
from .shard import Dims, ModelShard, ffn_columns, ffn_rows, kv_rows, o_columns

LAYOUTS = ("tp_aware", "naive", "local_sort")


def check_layout(layout: str) -> None:
    """Raises ValueError for an unknown layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: {layout!r}, expected one of {', '.join(LAYOUTS)}")


def ffn_cuts(m: ModelShard, c: Dims, g_idx: Tensor | None, layout: str = "tp_aware") -> tuple[Shard, Shard]:
    """(rows of gate and up, columns of down) of this rank.

    ``g_idx`` (intermediate,) is the group of each column of down, None where groups are contiguous.
    """
    rows, columns = ffn_rows(m, c), ffn_columns(m, c)
    if g_idx is None or layout == "local_sort":
        return rows, columns
    cut = Cut(c.intermediate_size, order=sorted_columns(g_idx)[slice(*m.ffn)])
    return (rows._replace(out=cut) if layout == "tp_aware" else rows), columns._replace(inn=cut)


def head_cuts(m: ModelShard, c: Dims, g_idx: Tensor | None, layout: str = "tp_aware") -> tuple[Shard, Shard]:
    """(rows of v, columns of o) of this rank; ``g_idx`` (num_heads * head_dim,) as in `ffn_cuts`, of o."""
    rows, columns = kv_rows(m, c), o_columns(m, c)
    inside = None
    if g_idx is not None and layout == "tp_aware":
        inside = head_order(g_idx, c.num_heads, c.num_kv_heads, c.head_dim)
    if inside is None:
        return rows, columns
    each = c.num_heads // c.num_kv_heads
    v = torch.cat([k * c.head_dim + inside[k] for k in m.kv_heads])
    o = torch.cat([h * c.head_dim + inside[h // each] for h in m.q_heads])
    return rows._replace(out=rows.out._replace(spans=(), order=v)), columns._replace(
        inn=columns.inn._replace(spans=(), order=o)
    )


def head_order(g_idx: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> Tensor | None:
    """The order inside each KV head (num_kv_heads, head_dim) that makes the groups of o contiguous.

    None when no legal one does: groups then cross heads, or the heads that read one KV head disagree.
    """
    keys = g_idx.long().view(num_kv_heads, num_heads // num_kv_heads, head_dim)
    order = torch.arange(head_dim).repeat(num_kv_heads, 1)
    # Lexicographic over the heads of a group: stable sorts, the least significant first.
    for head in reversed(range(keys.shape[1])):
        sorted_by = keys[:, head].gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, sorted_by)
    in_order = keys.gather(2, order[:, None].expand_as(keys)).flatten()
    return order if bool((in_order.diff() >= 0).all()) else None


class Align:
    """What Algorithm 2 does between the two GEMMs: AllGather, permutation by P2, this rank's chunk."""

    def __init__(self, group: TPGroup, g_idx: Tensor, spans: Sequence[Span]) -> None:
        """``spans``: the columns of each rank, of the first GEMM's output and of P2 alike."""
        self.group, self.sizes = group, [hi - lo for lo, hi in spans]
        self.order = sorted_columns(g_idx)[slice(*spans[group.rank])]

    def __call__(self, x: Tensor) -> Tensor:
        """(N, columns of this rank) in the stored order to (N, columns of this rank) in the order P2."""
        whole = gather_last(self.group, x, self.sizes, "AllGather between the GEMMs", everywhere=True)
        assert whole is not None
        return whole.index_select(1, self.order)
