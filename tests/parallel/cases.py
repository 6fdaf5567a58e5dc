"""Cases that every rank of a group runs (run.py): the exchanges and the sharded layers.

All ranks draw the same data from one seed and take their own pieces of it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastattn import ops
from fastattn.collectives import exchange, prompts
from fastattn.collectives.exact import Exact
from fastattn.collectives.failures import everywhere
from fastattn.parallel import group, shard
from fastattn.parallel.linear import ColumnLinear, RowLinear
from fastattn.parallel.vocab import VocabParallelEmbedding, VocabParallelHead
from fastattn.quant import packed
from fastattn.spec import Epilogue, PackedWeight, Point, Stream, SyncError, TPGroup
from fastattn.threads import machine
from tests.parallel.run import run

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POINT = Point(3, "attn", "decode")


@dataclass(frozen=True)
class Sizes:
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 16
    hidden_size: int = 96
    intermediate_size: int = 352  # 11 blocks of 32: uneven for 2, 3 and 4 ranks
    vocab_size: int = 1009


C = Sizes()


def splits(g: TPGroup) -> list[tuple[float, ...]]:
    return [(1.0,) * g.world, tuple(float(g.world - r) for r in range(g.world))]


def same_bits(g: TPGroup, x: Tensor) -> bool:
    raw = exchange.all_gather(g, x.contiguous().view(torch.uint8), "comparison of bits")
    return all(torch.equal(raw[0], other) for other in raw)


def close(ours: Tensor, torch_math: Tensor, exact: Tensor) -> None:
    """The house rule: at most twice the error of torch's own arithmetic in the same dtype."""
    eps = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    error = float((ours.double() - exact).abs().max())
    allowed = 2 * float((torch_math.double() - exact).abs().max()) + eps
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight.to(x.dtype) * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)


def within_rounding(ours: Tensor, terms: list[Tensor]) -> None:
    """Sums of T terms in ours' dtype, in any order, round T - 1 times: at most that error, elementwise."""
    wide = torch.stack([t.double() for t in terms])
    unit = torch.finfo(ours.dtype).eps / 2
    tiny = torch.finfo(ours.dtype).smallest_normal * unit * 2  # spacing of the smallest numbers
    allowed = (len(terms) - 1) * (1.02 * unit * wide.abs().sum(0) + tiny)
    assert ((ours.double() - wide.sum(0)).abs() <= allowed).all()


class Given:
    """A half-block whose partial result is known."""

    def __init__(self, partial: Tensor) -> None:
        self.rows, self._partial = partial.shape[0], partial
        self.row_parallel = packed.dense(torch.zeros(partial.shape[1], 1))

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        assert (lo, hi, out) == (0, self.rows, None)
        return self._partial.clone()

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        return self._partial.new_zeros(hi - lo, 1)


# ------------------------------------------------------------------------------------------------ cases
def all_reduce_gives_every_rank_the_same_bits(g: TPGroup) -> None:
    for dtype in DTYPES:
        for n in (1, 2, 7, 577, 4097, 100_003):
            parts = [torch.randn(n).to(dtype) for _ in range(g.world)]
            x = parts[g.rank].clone()
            exchange.all_reduce(g, x, "test").wait()
            assert same_bits(g, x), (dtype, n)
            within_rounding(x, parts)


def exact_policy_equals_float64(g: TPGroup) -> None:
    def norm(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.rms_norm(x, weight.to(x.dtype), 1e-5, residual)

    weight = torch.rand(95) + 0.5
    for dtype in DTYPES:
        for rows, with_bias, with_pending in ((1, False, False), (5, True, False), (13, True, True)):
            partials = torch.randn(g.world, rows, 95).to(dtype)
            pending = torch.randn(g.world, rows, 95).to(dtype) if with_pending else None
            residual, bias = torch.randn(rows, 95).to(dtype), torch.randn(95).to(dtype)
            epilogue = Epilogue(bias if with_bias else None, norm)
            stream = Stream(residual, None, None if pending is None else pending[g.rank])
            out = Exact().start(POINT, Given(partials[g.rank]), stream, epilogue, g).wait()
            everything = [*partials, *([] if pending is None else pending), residual]
            everything += [bias.expand_as(residual)] if with_bias else []
            assert out.hidden is not None
            assert out.pending is None
            assert out.rows is None
            same_type = everything[0]
            for term in everything[1:]:
                same_type = same_type + term
            total = torch.stack([t.double() for t in everything]).sum(0)
            within_rounding(out.residual, everything)
            close(out.hidden, rms(same_type, weight.to(dtype)), rms(total, weight.to(dtype)))
            assert same_bits(g, out.residual)
            assert same_bits(g, out.hidden)
            bare = Exact().start(POINT, Given(partials[g.rank]), stream, Epilogue(epilogue.bias, None), g)
            assert bare.wait().hidden is None


def exact_policy_makes_one_all_reduce(g: TPGroup) -> None:
    exchange.traffic.clear()
    partial = torch.randn(4, 96, dtype=torch.bfloat16)
    work = Exact().start(POINT, Given(partial), Stream(partial, None), Epilogue(None, None), g)
    work.wait()
    expected = {} if g.world == 1 else {"all_reduce": 1}
    assert exchange.traffic.calls == expected
    assert exchange.traffic.bytes == dict.fromkeys(expected, 4 * 96 * 2)  # 16-bit values travel


def cancel_awaits_the_exchange(g: TPGroup) -> None:
    x = torch.ones(1000)
    work = Exact().start(POINT, Given(x[None]), Stream(x[None], None), Epilogue(None, None), g)
    work.cancel()
    work.cancel()
    exchange.all_reduce(g, x, "after a cancelled one").wait()
    assert torch.equal(x, torch.full_like(x, g.world))


def idle_sees_an_exchange_under_way(g: TPGroup) -> None:
    if g.world == 1:
        assert exchange.idle(0)
        return
    exchange.all_reduce(g, torch.ones(1), "everybody is here").wait()
    lane, others = exchange.Lane(g, "late messages"), [r for r in range(g.world) if r != g.rank]
    arriving = lane.swap({}, {r: torch.ones(5) for r in others})
    if g.rank == 0:
        assert not exchange.idle(0.05)
    else:
        time.sleep(0.5)
    sent = lane.swap({r: torch.ones(5) for r in others}, {})
    arriving.wait()
    sent.wait()
    assert exchange.idle(5)


def weight_of(kind: str, out: int, inn: int, bias: Tensor | None) -> PackedWeight:
    if kind == "dense":
        return packed.dense(torch.randn(out, inn) / math.sqrt(inn), bias)
    scales, mins = torch.rand(out, inn // 32) / 32, torch.randn(out, inn // 32) / 32
    if kind == "int4":
        return packed.pack_int4(torch.randint(0, 16, (out, inn)), scales, mins, 32, bias=bias)
    return packed.pack_int8(torch.randint(-9, 9, (out, inn)), scales, mins, 32, bias=bias)


def rows_of(w: PackedWeight, s: shard.Shard) -> PackedWeight:
    pieces = [packed.slice_out(w, lo, hi) for lo, hi in s.out.spans]
    return packed.concat_out(pieces)._replace(
        bias=None if w.bias is None else shard.cut_vector(w.bias, s.out)
    )


def columns_of(w: PackedWeight, s: shard.Shard) -> PackedWeight:
    ((lo, hi),) = s.inn.spans
    return packed.slice_in(w, lo, hi)._replace(bias=w.bias)


def sharded_mlp_equals_dense(g: TPGroup) -> None:
    """gate, up, down with biases; the last mix of formats cannot be fused."""
    x = torch.randn(7, C.hidden_size)
    for kinds in (("dense", "dense"), ("int4", "int4"), ("int8", "int8"), ("int4", "dense")):
        gate, up = (
            weight_of(k, C.intermediate_size, C.hidden_size, torch.randn(C.intermediate_size)) for k in kinds
        )
        down = weight_of(kinds[0], C.hidden_size, C.intermediate_size, torch.randn(C.hidden_size))
        g64, u64, d64 = (
            [packed.dequantize(w, torch.float64), w.bias.double()]
            for w in (gate, up, down)
            if w.bias is not None
        )
        h = torch.nn.functional.silu(torch.nn.functional.linear(x.double(), *g64))
        expected = torch.nn.functional.linear(h * torch.nn.functional.linear(x.double(), *u64), *d64)
        for split in splits(g):
            m = shard.plan(C, g.world, split)[g.rank]
            column = ColumnLinear(*(rows_of(w, shard.ffn_rows(m, C)) for w in (gate, up)))
            row = RowLinear(columns_of(down, shard.ffn_columns(m, C)))
            assert len(column.weights) == (1 if kinds[0] == kinds[1] else 2)
            assert column.widths == (m.ffn[1] - m.ffn[0],) * 2
            partial = row(ops.swiglu(column(x)))
            epilogue = Epilogue(row.bias, None)
            out = Exact().start(POINT, Given(partial), Stream(torch.zeros_like(x), None), epilogue, g).wait()
            assert (out.residual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def sharded_attention_equals_dense(g: TPGroup) -> None:
    """q, k, v with biases, cut by heads; a single key makes softmax trivial: out = v of the right head."""
    d, q_size, kv_size = C.head_dim, C.num_heads * C.head_dim, C.num_kv_heads * C.head_dim
    x = torch.randn(5, C.hidden_size)
    q, k, v = (weight_of("dense", n, C.hidden_size, torch.randn(n)) for n in (q_size, kv_size, kv_size))
    o = weight_of("dense", C.hidden_size, q_size, torch.randn(C.hidden_size))

    def full(w: PackedWeight, y: Tensor) -> Tensor:
        assert w.bias is not None
        return torch.nn.functional.linear(y, packed.dequantize(w, torch.float64), w.bias.double())

    whole_q, whole_v = full(q, x.double()), full(v, x.double())
    gate = whole_q.view(5, C.num_heads, d).tanh()  # makes the result depend on q's cut
    heads = whole_v.view(5, C.num_kv_heads, 1, d).expand(-1, -1, C.num_heads // C.num_kv_heads, -1)
    expected = full(o, (gate * heads.reshape(5, C.num_heads, d)).flatten(1))
    for split in splits(g):
        m = shard.plan(C, g.world, split)[g.rank]
        kv = shard.kv_rows(m, C)
        qkv = ColumnLinear(rows_of(q, shard.q_rows(m, C)), rows_of(k, kv), rows_of(v, kv))
        lq, _, lv = qkv(x).split(qkv.widths, -1)
        each = len(m.q_heads) // len(m.kv_heads)
        lv = lv.reshape(5, len(m.kv_heads), 1, d).expand(-1, -1, each, -1)
        local = lq.reshape(5, len(m.q_heads), d).tanh() * lv.reshape(5, -1, d)
        row = RowLinear(columns_of(o, shard.o_columns(m, C)))
        make, stream = Given(row(local.flatten(1))), Stream(torch.zeros_like(x), None)
        out = Exact().start(POINT, make, stream, Epilogue(row.bias, None), g).wait()
        assert (out.residual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def vocabulary_is_exact(g: TPGroup) -> None:
    ids = torch.tensor([0, C.vocab_size - 1, 5, 500, 336, 337, 5])
    for kind in ("dense", "int4", "int8"):
        table = weight_of(kind, C.vocab_size, C.hidden_size, None)
        for split in splits(g):
            spans = [m.vocab for m in shard.plan(C, g.world, split)]
            mine = packed.slice_out(table, *spans[g.rank])
            for dtype in DTYPES:
                layer = VocabParallelEmbedding(mine, spans, g, dtype)
                # The second way is that of devices, where ids may not be looked at.
                for found in (layer(ids), layer.summed(ids)):
                    assert found.dtype == dtype
                    assert torch.equal(found, ops.embedding(ids, table, dtype))
            hidden, last = torch.randn(9, C.hidden_size), torch.tensor([2, 8])
            local = ops.linear(hidden, mine)
            head = VocabParallelHead(mine, spans, g)
            on_first, on_all = head(hidden), head(hidden, last, everywhere=True)
            assert (on_first is None) == (g.rank != 0)
            assert on_all is not None
            assert same_bits(g, on_all)
            lo, hi = spans[g.rank]
            assert torch.equal(on_all[:, lo:hi], ops.linear(hidden[last], mine))
            if on_first is not None:
                assert torch.equal(on_first[:, lo:hi], local)
                expected = hidden.double() @ packed.dequantize(table, torch.float64).T
                assert (on_first.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def ids_outside_the_vocabulary_are_refused(g: TPGroup) -> None:
    spans = [m.vocab for m in shard.plan(C, g.world)]
    lo, hi = spans[g.rank]
    embedding = VocabParallelEmbedding(packed.dense(torch.randn(hi - lo, 8)), spans, g)
    exchange.traffic.clear()
    for bad in (-1, C.vocab_size):
        with pytest.raises(ValueError, match=f"ids: {bad} is outside the vocabulary of 1009 tokens"):
            embedding(torch.tensor([3, bad]))
    assert not exchange.traffic.calls


def prompts_travel(g: TPGroup) -> None:
    for batch in ([[1, 2, 3], [], [1 << 40]], [[7]], [[]], []):
        assert prompts.broadcast_prompts(g, batch if g.rank == 0 else None) == batch
    tokens = torch.tensor([5, 1 << 33])
    assert torch.equal(prompts.broadcast_tokens(g, tokens if g.rank == 0 else None, 2), tokens)


def what_rank_0_fails_at_costs_nothing(g: TPGroup) -> None:
    if g.rank == 0:
        for at_work in (prompts.preparing_prompts(g), prompts.choosing_tokens(g, 3)):
            with pytest.raises(KeyError), at_work:
                raise KeyError("bad")
    else:
        with pytest.raises(ValueError, match="prompts: rank 0 refused them"):
            prompts.broadcast_prompts(g, None)
        with pytest.raises(ValueError, match="tokens: rank 0 has none"):
            prompts.broadcast_tokens(g, None, 3)
    prompts_travel(g)


def what_one_rank_fails_at_all_fail_at(g: TPGroup) -> None:
    for bad in range(g.world):
        expected = (
            f"^{bad}$" if g.rank == bad else f"the work: failed on rank {bad}, whose own error says why"
        )
        with pytest.raises(KeyError, match=expected), everywhere(g, KeyError, "the work"):
            {r: "" for r in range(g.world) if r != bad}[g.rank]
    with everywhere(g, KeyError, "the work"):
        pass
    prompts_travel(g)


def agreement_names_the_ranks_that_differ(g: TPGroup) -> None:
    exchange.agree(g, "the model", b"same")
    if g.world == 1:
        return
    odd = g.world - 1
    others = "rank 0" if g.world == 2 else "ranks " + ", ".join(map(str, range(odd)))
    camps = rf"\({others}: [0-9a-f]{{12}}; rank {odd}: [0-9a-f]{{12}}\)"
    with pytest.raises(
        SyncError, match=f"rank {g.rank}: start-up check of the model: the ranks differ {camps}"
    ):
        exchange.agree(g, "the model", b"longer" if g.rank == odd else b"one")


def threads_share_the_machine(g: TPGroup) -> None:
    """Started without torchrun: the ranks find out that all of them are here."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    here = machine()
    chosen = group.set_threads(g)
    assert chosen.num == torch.get_num_threads() == max(1, here.threads // g.world)
    assert chosen.why == f"{here} for {g.world} rank{'s' * (g.world > 1)} here"
    assert group.set_threads(g, 1) == group.Threads(1, "asked for")


CASES: tuple[Callable[[TPGroup], None], ...] = (
    all_reduce_gives_every_rank_the_same_bits,
    exact_policy_equals_float64,
    exact_policy_makes_one_all_reduce,
    cancel_awaits_the_exchange,
    idle_sees_an_exchange_under_way,
    sharded_mlp_equals_dense,
    sharded_attention_equals_dense,
    vocabulary_is_exact,
    ids_outside_the_vocabulary_are_refused,
    prompts_travel,
    what_rank_0_fails_at_costs_nothing,
    what_one_rank_fails_at_all_fail_at,
    agreement_names_the_ranks_that_differ,
    threads_share_the_machine,
)


if __name__ == "__main__":
    run(CASES)
