"""Orders of columns: what a group holds, and which permutations stay inside heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.quant import column_order as orders


def sorted_columns(g_idx: torch.Tensor) -> torch.Tensor:
    """P of TP-aware dequantization: the columns with their groups side by side."""
    return g_idx.argsort(stable=True)


@given(columns=st.integers(1, 300), group_size=st.sampled_from([32, 64, 128, -1]), seed=st.integers(0, 99))
def test_every_order_visits_all_and_fills_all_groups_but_the_last(
    columns: int, group_size: int, seed: int
) -> None:
    energy = torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    size = columns if group_size == -1 else group_size
    for order in (
        orders.by_position(columns, group_size),
        orders.by_activation(energy, group_size),
        orders.by_group(energy, group_size),
        orders.within_heads(energy, group_size, 1, 1),
    ):
        assert torch.equal(order.visit.sort().values, torch.arange(columns))
        assert order.g_idx.dtype == torch.int32
        counts = order.g_idx.bincount().tolist()
        assert sum(counts) == columns
        assert all(n == size for n in counts[:-1])


def test_act_order_follows_the_energy() -> None:
    energy = torch.tensor([1.0, 5.0, 3.0, 5.0, 0.0])
    order = orders.by_activation(energy, 2)
    assert order.visit.tolist() == [1, 3, 2, 0, 4]
    assert order.g_idx.tolist() == [1, 0, 1, 0, 2]
    in_place = orders.by_group(energy, 2)
    assert in_place.visit.tolist() == [3, 2, 1, 0, 4]
    assert in_place.g_idx.tolist() == [0, 0, 1, 1, 2]


@given(
    kv=st.integers(1, 4),
    sharing=st.integers(1, 4),
    head_dim=st.sampled_from([16, 24, 32, 64, 80, 96, 128, 256]),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 99),
)
def test_within_heads_can_be_folded_into_v(
    kv: int, sharing: int, head_dim: int, group_size: int, seed: int
) -> None:
    """P permutes inside each head, and all query heads of a KV head in the same way."""
    heads = kv * sharing
    energy = torch.rand(heads * head_dim, generator=torch.Generator().manual_seed(seed))
    order = orders.within_heads(energy, group_size, heads, kv)
    by_head = sorted_columns(order.g_idx).view(heads, head_dim)
    assert torch.equal(by_head // head_dim, torch.arange(heads)[:, None].expand(heads, head_dim))
    inside = (by_head % head_dim).view(kv, sharing, head_dim)
    assert torch.equal(inside, inside[:, :1].expand_as(inside))
    # Groups are visited one after the other, the most active first.
    groups = order.g_idx[order.visit].tolist()
    runs = [g for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
    assert len(runs) == len(set(runs))
    total = torch.zeros(len(runs)).index_add_(0, order.g_idx.long(), energy)
    assert torch.equal(total[runs], total.sort(descending=True).values)


def test_within_heads_sorts_by_what_all_query_heads_of_a_kv_head_see() -> None:
    head_dim, group_size = 64, 32
    energy = torch.zeros(2, head_dim)
    energy[0, 1::2], energy[1, ::2] = 1.0, 0.5  # the first head's odd columns outweigh the second's even ones
    order = orders.within_heads(energy.flatten(), group_size, 2, 1)
    expected = torch.tensor([1, 0] * 32)
    assert torch.equal(order.g_idx.view(2, head_dim)[0], expected.int())
    assert torch.equal(order.g_idx.view(2, head_dim)[1], (expected + 2).int())


@pytest.mark.parametrize("group_size", [64, 128])
def test_heads_no_larger_than_a_group_stay_as_they_are(group_size: int) -> None:
    order = orders.within_heads(torch.rand(256), group_size, 4, 2)
    assert torch.equal(order.g_idx, orders.by_position(256, group_size).g_idx)
