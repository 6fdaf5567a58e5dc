"""Layouts of act-order pairs in float64: every number of ranks gives what one rank gives, to rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from fastattn.parallel import act_order, shard
from fastattn.quant import grouped, packed
from fastattn.spec import Cut, PackedWeight, Shard, TPGroup
from tests.models.quantized import head_order
from tests.quant.stored import Spec, Stored, store

WORLDS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Sizes:
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 16
    hidden_size: int = 64
    intermediate_size: int = 352  # 11 blocks of 32: uneven for 2, 3 and 4 ranks
    vocab_size: int = 100


C = Sizes()


@cache
def stored(spec: Spec, out: int, inn: int, seed: int) -> Stored:
    return store(spec, out, inn, seed)


def groups_of(w: Stored, inn: int) -> Tensor | None:
    return w.format.g_idx(w.tensors, inn)


def load(w: Stored, s: Shard) -> PackedWeight:
    return grouped.pack(w.format.read(w.tensors, s.out, s.inn))


def wide(w: Stored, s: Shard) -> Tensor:
    """The piece in float64, checked against the whole matrix bit by bit."""
    found = packed.dequantize(load(w, s), torch.float64)
    assert torch.equal(found, w.values[index(s.out)][:, index(s.inn)])
    return found


def index(cut: Cut) -> Tensor:
    if cut.order is not None:
        return cut.order
    return torch.cat([torch.arange(lo, hi) for lo, hi in cut.spans or ((0, cut.size),)])


def splits(world: int) -> list[tuple[float, ...]]:
    return [(1.0,) * world, tuple(float(world - r) for r in range(world))]


MLP_SPECS = [
    Spec("gptq", 4, 32, True), Spec("gptq", 3, 32, True, False), Spec("gptq", 8, 64, True, True, "v2"),
    Spec("gptq", 4, 128, True), Spec("gptq", 4, -1, True), Spec("gptq", 4, 48, True),
    Spec("compressed-tensors", 4, 32, True, False),
]  # fmt: skip


@pytest.mark.parametrize("align", [32, 1], ids=["blocks", "anywhere"])
@pytest.mark.parametrize("layout", act_order.LAYOUTS)
@pytest.mark.parametrize("spec", MLP_SPECS, ids=str)
def test_mlp(spec: Spec, layout: str, align: int) -> None:
    """SwiGLU with biases. Cut anywhere, shards begin and end inside groups."""
    torch.manual_seed(0)
    x = torch.randn(5, C.hidden_size, dtype=torch.float64)
    gate, up = (stored(spec, C.intermediate_size, C.hidden_size, seed) for seed in (1, 2))
    down = stored(spec, C.hidden_size, C.intermediate_size, 3)
    biases = [torch.randn(n, dtype=torch.float64) for n in (C.intermediate_size,) * 2 + (C.hidden_size,)]
    expected = linear(
        silu(linear(x, gate.values, biases[0])) * linear(x, up.values, biases[1]), down.values, biases[2]
    )
    g_idx = groups_of(down, C.intermediate_size)
    assert (g_idx is None) == (spec.group_size == -1)
    for world in WORLDS:
        for weights in splits(world):
            shards = shard.plan(C, world, weights, align=align)
            cuts = [act_order.ffn_cuts(m, C, g_idx, layout) for m in shards]
            hidden = [
                silu(linear(x, wide(gate, rows), shard.cut_vector(biases[0], rows.out)))
                * linear(x, wide(up, rows), shard.cut_vector(biases[1], rows.out))
                for rows, _ in cuts
            ]
            if layout == "naive" and g_idx is not None:
                whole = torch.cat(hidden, dim=1)[:, grouped.sorted_columns(g_idx)]
                hidden = [whole[:, slice(*m.ffn)] for m in shards]
            partials = [linear(h, wide(down, columns)) for h, (_, columns) in zip(hidden, cuts, strict=True)]
            total = torch.stack(partials).sum(0) + biases[2]
            assert (total - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("spec", [s for s in MLP_SPECS if s.group_size != -1], ids=str)
def test_tp_aware_shards_hold_their_own_groups(spec: Spec) -> None:
    """No permutation and no g_idx at run time; scales of this rank's groups only."""
    down = stored(spec, C.hidden_size, C.intermediate_size, 3)
    g_idx = groups_of(down, C.intermediate_size)
    for world in WORLDS:
        for m in shard.plan(C, world, align=1):
            rows, columns = act_order.ffn_cuts(m, C, g_idx)
            assert rows.out.order is not None
            assert columns.inn.order is not None
            assert torch.equal(rows.out.order, columns.inn.order)
            w = load(down, columns)
            assert w.x_perm is None
            assert w.g_idx is None
            lo, hi = m.ffn
            assert w.tensors["scales"].shape[1] == -(-hi // spec.group_size) - lo // spec.group_size
            sorted_locally = load(down, act_order.ffn_cuts(m, C, g_idx, "local_sort")[1])
            assert (sorted_locally.x_perm is None) == (sorted_locally.shape[1] <= 1)


HEADS = {"mha": (8, 8), "gqa": (8, 4), "mqa": (8, 1)}


@pytest.mark.parametrize("inside", [True, False], ids=["inside-heads", "global"])
@pytest.mark.parametrize("group_size", [16, 32, 48])
@pytest.mark.parametrize("kind", HEADS)
def test_attention(kind: str, group_size: int, inside: bool) -> None:
    """v -> softmax mixing of tokens -> o, with biases of v; folded where that is legal, exact everywhere."""
    heads, kv_heads = HEADS[kind]
    c = replace(C, num_heads=heads, num_kv_heads=kv_heads, head_dim=32)
    torch.manual_seed(1)
    spec, width, each = Spec("gptq", 4, group_size, True), heads * 32, heads // kv_heads
    x = torch.randn(6, c.hidden_size, dtype=torch.float64)
    mixing = torch.randn(heads, 6, 6, dtype=torch.float64).softmax(-1)
    order = head_order(heads, kv_heads, 32, group_size) if inside else None
    v, o = store(spec, kv_heads * 32, c.hidden_size, 1), store(spec, c.hidden_size, width, 2, order)
    bias = torch.randn(kv_heads * 32, dtype=torch.float64)

    def attend(values: Tensor, of: list[int], q_heads: tuple[int, ...]) -> Tensor:
        mixed = [mixing[h] @ values[:, k * 32 : (k + 1) * 32] for h, k in zip(q_heads, of, strict=True)]
        return torch.cat(mixed, dim=1)

    everyone = tuple(range(heads))
    expected = attend(linear(x, v.values, bias), [h // each for h in everyone], everyone) @ o.values.t()
    g_idx = groups_of(o, width)
    for world in WORLDS:
        for weights in splits(world):
            partials = []
            for m in shard.plan(c, world, weights):
                rows, columns = act_order.head_cuts(m, c, g_idx)
                values = linear(x, wide(v, rows), shard.cut_vector(bias, rows.out))
                local = len(m.q_heads) // len(m.kv_heads)
                of = [i // local for i in range(len(m.q_heads))]
                partials.append(linear(attend(values, of, m.q_heads), wide(o, columns)))
                folded = rows.out.order is not None
                assert folded == (inside and g_idx is not None)
                if folded:
                    assert load(o, columns).x_perm is None
            assert (torch.stack(partials).sum(0) - expected).abs().max() <= 1e-10


@pytest.mark.parametrize(
    ("g_idx", "heads", "kv_heads", "wanted"),
    [
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, 1, [[0, 1, 2, 3]]),
        ([1, 0, 1, 0, 3, 2, 3, 2], 2, 1, [[1, 3, 0, 2]]),
        ([1, 0, 1, 0, 3, 2, 3, 2], 2, 2, [[1, 3, 0, 2], [1, 3, 0, 2]]),
        ([1, 0, 1, 0, 2, 3, 3, 2], 2, 1, None),  # the heads of one KV head disagree
        ([1, 0, 1, 0, 2, 3, 3, 2], 2, 2, [[1, 3, 0, 2], [0, 3, 1, 2]]),
        ([2, 2, 3, 3, 0, 0, 1, 1], 2, 2, None),  # sorting would swap the heads
        ([0, 1, 2, 3, 0, 1, 2, 3], 2, 1, None),  # groups cross heads
        ([0, 0, 0, 1, 1, 2, 2, 2], 2, 1, [[0, 1, 2, 3]]),
        ([0, 1, 0, 0, 1, 2, 2, 2], 2, 1, [[0, 2, 3, 1]]),
        ([0, 1, 0, 0, 2, 2, 1, 2], 2, 1, [[2, 0, 3, 1]]),
        ([0, 1, 0, 0, 2, 1, 2, 2], 2, 1, None),  # column 1 comes last in one head, first in the other
        ([0, 1, 0, 0, 1, 2, 1, 2], 2, 1, [[0, 2, 3, 1]]),
    ],
)  # fmt: skip
def test_head_order(g_idx: list[int], heads: int, kv_heads: int, wanted: list[list[int]] | None) -> None:
    found = act_order.head_order(torch.tensor(g_idx), heads, kv_heads, len(g_idx) // heads)
    assert (None if found is None else found.tolist()) == wanted


def test_align_at_one_rank() -> None:
    g = TPGroup(None, 0, 1, 1.0, (1.0,))
    align = act_order.Align(g, torch.tensor([1, 0, 1, 0]), [(0, 4)])
    assert align(torch.tensor([[10.0, 11.0, 12.0, 13.0]])).tolist() == [[11.0, 13.0, 10.0, 12.0]]


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout: 'fast', expected one of tp_aware, naive, local_sort"):
        act_order.check_layout("fast")
