"""`plan` and the cuts that follow from it: exact partitions, uniform GQA, sensible errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.parallel import shard
from fastattn.spec import Cut


@dataclass(frozen=True)
class Sizes:
    num_heads: int
    num_kv_heads: int
    head_dim: int = 64
    hidden_size: int = 576
    intermediate_size: int = 1536
    vocab_size: int = 49152


SMOLLM2 = Sizes(9, 3)


@pytest.mark.parametrize(
    ("world", "q", "kv"),
    [
        (1, [9], [(0, 1, 2)]),
        (2, [6, 3], [(0, 1), (2,)]),
        (3, [3, 3, 3], [(0,), (1,), (2,)]),
        (4, [3, 2, 2, 2], [(0,), (1,), (1, 2), (2,)]),
        (5, [2, 2, 2, 2, 1], [(0,), (0, 1), (1,), (2,), (2,)]),
        (9, [1] * 9, [(0,), (0,), (0,), (1,), (1,), (1,), (2,), (2,), (2,)]),
    ],
    ids=lambda v: str(v) if isinstance(v, int) else "",
)
def test_smollm2(world: int, q: list[int], kv: list[tuple[int, ...]]) -> None:
    shards = shard.plan(SMOLLM2, world)
    assert [len(m.q_heads) for m in shards] == q
    assert [m.kv_heads for m in shards] == kv


def test_unequal_groups_repeat_kv_heads() -> None:
    """Heads 3, 4, 5 of 32 over 8: one reads KV head 0, two read KV head 1."""
    third = shard.plan(Sizes(32, 8), 12)[1]
    assert third.q_heads == (3, 4, 5)
    assert third.kv_heads == (0, 1, 1)
    assert shard.kv_rows(third, Sizes(32, 8)).out.spans == ((0, 128), (64, 128))


def test_weights_decide_all_shares() -> None:
    first, second = shard.plan(SMOLLM2, 2, (1, 2))
    assert (first.q_heads, second.q_heads) == ((0, 1, 2), (3, 4, 5, 6, 7, 8))
    assert (first.ffn, second.ffn) == ((0, 512), (512, 1536))
    assert (first.vocab, second.vocab) == ((0, 16384), (16384, 49152))
    assert shard.plan(SMOLLM2, 3, (98, 1, 1))[2].ffn == (1504, 1536)  # never without work


@st.composite
def models(draw: st.DrawFn) -> tuple[Sizes, int, tuple[float, ...] | None, int]:
    kv = draw(st.integers(1, 12))
    align = draw(st.sampled_from([1, 16, 32]))
    heads = kv * draw(st.integers(1, 9))
    world = draw(st.integers(1, heads))
    ffn = draw(st.integers(align * (world - 1) + 1, align * (world + 40)))
    sizes = Sizes(heads, kv, draw(st.integers(1, 80)), 48, ffn, draw(st.integers(world, 3000)))
    shares = st.lists(st.floats(0.01, 100), min_size=world, max_size=world).map(tuple)
    return sizes, world, draw(st.none() | shares), align


@given(models())
def test_plan_is_an_exact_partition(model: tuple[Sizes, int, tuple[float, ...] | None, int]) -> None:
    c, world, weights, align = model
    shards = shard.plan(c, world, weights, align=align)
    assert [(m.rank, m.world) for m in shards] == [(r, world) for r in range(world)]
    assert [h for m in shards for h in m.q_heads] == list(range(c.num_heads))
    for spans, size in (
        ([m.ffn for m in shards], c.intermediate_size),
        ([m.vocab for m in shards], c.vocab_size),
    ):
        assert spans[0][0] == 0
        assert spans[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert all(lo < hi for lo, hi in spans)
    assert all(lo % align == 0 for m in shards for lo in m.ffn[:1])
    group = c.num_heads // c.num_kv_heads
    for m in shards:
        assert m.q_heads
        per_kv, rest = divmod(len(m.q_heads), len(m.kv_heads))
        assert rest == 0
        assert [m.kv_heads[h // per_kv] for h in range(len(m.q_heads))] == [h // group for h in m.q_heads]
        if world <= c.num_kv_heads:
            assert per_kv == group  # whole groups, nothing replicated
    total = math.fsum(weights) if weights else world
    if world <= c.num_kv_heads:
        for m in shards:
            ideal = c.num_kv_heads * (weights[m.rank] if weights else 1.0) / total
            assert len(m.kv_heads) <= max(1, math.floor(ideal) + 1)


@given(models())
def test_cuts_select_what_the_plan_says(model: tuple[Sizes, int, tuple[float, ...] | None, int]) -> None:
    """Every cut, applied to a vector of its own indices, gives the rows of the heads it names."""
    c, world, weights, align = model
    d = c.head_dim
    for m in shard.plan(c, world, weights, align=align):
        q, kv = shard.q_rows(m, c), shard.kv_rows(m, c)
        for cut, heads in ((q.out, m.q_heads), (kv.out, m.kv_heads), (shard.o_columns(m, c).inn, m.q_heads)):
            picked = shard.cut_vector(torch.arange(cut.size), cut)
            assert picked.tolist() == [h * d + i for h in heads for i in range(d)]
            assert cut.length() == len(heads) * d
        for s in (shard.ffn_rows(m, c).out, shard.ffn_columns(m, c).inn):
            assert (s.size, s.spans) == (c.intermediate_size, (m.ffn,))
        assert shard.vocab_rows(m, c).out == Cut(c.vocab_size, (m.vocab,))
        for s in (q, kv, shard.ffn_rows(m, c), shard.vocab_rows(m, c)):
            assert s.inn == Cut(c.hidden_size)
        for s in (shard.o_columns(m, c), shard.ffn_columns(m, c)):
            assert s.out == Cut(c.hidden_size)


def test_cut_vector_by_index() -> None:
    x = torch.arange(5)
    assert shard.cut_vector(x, Cut(5, order=torch.tensor([4, 0]))).tolist() == [4, 0]
    assert shard.cut_vector(x, Cut(5)).data_ptr() == x.data_ptr()
    with pytest.raises(ValueError, match=r"x: \(5,\), expected \(6,\)"):
        shard.cut_vector(x, Cut(6))


@pytest.mark.parametrize(
    ("sizes", "world", "weights", "align", "message"),
    [
        (SMOLLM2, 10, None, 32, "world: 10 ranks, this model has 9 query heads: expected 1 to 9"),
        (SMOLLM2, 0, None, 32, "world: 0 ranks"),
        (Sizes(9, 3, intermediate_size=96), 4, None, 32, "has 3 blocks of 32 MLP columns: expected 1 to 3"),
        (Sizes(9, 3, vocab_size=2), 3, None, 32, "has 2 vocabulary rows"),
        (Sizes(9, 2), 1, None, 32, "num_heads: 9, expected a multiple of num_kv_heads 2"),
        (SMOLLM2, 2, (1.0,), 32, "weights: .*expected 2 positive numbers"),
        (SMOLLM2, 2, (1.0, 0.0), 32, "weights: .*expected 2 positive numbers"),
        (SMOLLM2, 2, (1.0, math.nan), 32, "weights: .*expected 2 positive numbers"),
        (SMOLLM2, 2, None, 0, "align: 0"),
    ],
    ids=["heads", "none", "mlp", "vocab", "gqa", "count", "zero", "nan", "align"],
)
def test_impossible_plans(
    sizes: Sizes, world: int, weights: tuple[float, ...] | None, align: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shard.plan(sizes, world, weights, align=align)
