"""A decoding step as native calls equals the ops one by one, bit for bit; and when it is not taken."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import dispatch
from fastattn.collectives.exact import Exact
from fastattn.collectives.steps import Exchange
from fastattn.memory.paged import PagedKvCache
from fastattn.models.fused import FusedDecoder, reasons_against
from fastattn.models.generate import Model
from fastattn.models.llama import Decoder
from fastattn.native import kernels
from fastattn.ops import linear
from fastattn.parallel.act_order import Align
from fastattn.parallel.linear import ColumnLinear
from fastattn.parallel.vocab import VocabParallelEmbedding
from fastattn.quant.packed import dense, dequantize, slice_out
from fastattn.spec import Epilogue, Point, Produce, Stream, TPGroup
from tests.models.builders import hf_model, save_gguf, save_hf
from tests.models.quantized import save_quantized
from tests.models.test_parity import CONFIGS
from tests.quant.stored import Spec

SEQUENCES = (0, 1, 2)


def decode(model: Model, *, fused: bool) -> list[Tensor]:
    """Hidden states of a ragged prefill, then of steps of 3, 2 and 1 sequences, and what the cache holds."""
    decoder, config = model.decoder, model.config
    decoder.fused = fused
    heads = decoder.blocks[0][0].kv_heads
    cache = PagedKvCache(config.num_layers, 24, 4, heads, config.head_dim, dtype=model.dtype)
    for side in (cache.keys, cache.values):
        side.zero_()
    generator = torch.Generator().manual_seed(1)
    results = []
    for lengths in ((2, 1, 2), (1, 1, 1), (1, 0, 1), (1,), *(((1, 1),) * 20)):
        step = cache.reserve(SEQUENCES[: len(lengths)], lengths)
        ids = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
        results.append(decoder.forward(ids, step, cache))
    return [*results, cache.keys, cache.values]


def assert_equal_both_ways(model: Model, calls_a_step: int) -> None:
    wanted = decode(model, fused=False)
    before = dispatch.calls["cpu", "decoder"]
    found = decode(model, fused=True)
    assert dispatch.calls["cpu", "decoder"] - before == calls_a_step * (len(found) - 2)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = kernels.isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def assert_equal_tokens(model: Model) -> None:
    """Steps of 3, 2 and 1 sequences choose the tokens that head and argmax choose."""
    decoder, config = model.decoder, model.config
    decoder.fused = True
    heads = decoder.blocks[0][0].kv_heads
    caches = [PagedKvCache(config.num_layers, 24, 4, heads, config.head_dim, dtype=model.dtype) for _ in "ab"]
    ids = torch.randint(0, config.vocab_size, (9,), generator=torch.Generator().manual_seed(2))
    for cache in caches:
        cache.keys.zero_()
        cache.values.zero_()
        decoder.forward(ids, cache.reserve(SEQUENCES, (4, 3, 2)), cache)
    ids = ids[:3]
    for count in (3, 3, 2, 1, 1):
        ids, steps = ids[:count], [cache.reserve(SEQUENCES[:count], (1,) * count) for cache in caches]
        logits = decoder.head(decoder.forward(ids, steps[0], caches[0]))
        assert logits is not None
        before = dispatch.calls["cpu", "decoder"]
        found = decoder.next_tokens(ids, steps[1], caches[1])
        assert dispatch.calls["cpu", "decoder"] == before + 1
        assert found is not None
        assert found.tolist() == logits.float().numpy().argmax(-1).tolist()
        ids = found
    assert torch.equal(caches[0].keys, caches[1].keys)
    assert torch.equal(caches[0].values, caches[1].values)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name: str, dtype: str, tmp_path: Path) -> None:
    family, overrides = CONFIGS[name]
    theirs = hf_model(family, seed=1, **overrides)
    model = fastattn.load(save_hf(theirs, tmp_path), dtype=dtype)
    # Biases after the sums belong to the sync points, so such a model goes half-block by half-block.
    halves = 2 * model.config.num_layers
    assert_equal_both_ways(model, halves if overrides.get("mlp_bias") else 1)
    if not overrides.get("mlp_bias"):
        assert_equal_tokens(model)


@pytest.mark.parametrize(
    ("quant", "act"),
    [*((q, "") for q in ("Q4_0", "Q4_1", "Q8_0", "Q5_1", "BF16")), ("Q4_1", "int8"), ("Q8_0", "int8")],
)
def test_quantized_weights(quant: str, act: str, dtype: str, isa: str, tmp_path: Path) -> None:
    theirs = hf_model("llama", hidden_size=256, intermediate_size=512)
    save_gguf(theirs, tmp_path / "model.gguf", quant)
    model = fastattn.load(tmp_path / "model.gguf", dtype=dtype, act=act)
    assert_equal_both_ways(model, 1)
    assert_equal_tokens(model)


def test_the_head_takes_integers_where_it_may(tmp_path: Path) -> None:
    """With the likeliest tokens of a head whose input is rounded, which are not always those of one exact."""
    save_gguf(hf_model("llama", hidden_size=256, intermediate_size=512), tmp_path / "model.gguf", "Q8_0")
    model = fastattn.load(tmp_path / "model.gguf", act="int8")
    decoder, config = model.decoder, model.config
    heads = decoder.blocks[0][0].kv_heads
    changed = 0
    for batch in torch.arange(config.vocab_size).split(32):
        cache = PagedKvCache(config.num_layers, 32, 4, heads, config.head_dim, dtype=model.dtype)
        for turn in range(4):
            ids, step = batch.roll(turn * turn), cache.reserve(range(len(batch)), [1] * len(batch))
            hidden = decoder.forward(ids, step, cache)
            rounded, exact = (linear(hidden, decoder.head.weight, act=act).argmax(-1) for act in ("int8", ""))
            found = decoder.next_tokens(ids, step, cache)  # appends the same keys again
            assert found is not None
            assert torch.equal(found, rounded)
            changed += int((rounded != exact).sum())
    assert changed


def test_matrices_of_different_formats_side_by_side(dtype: str, tmp_path: Path) -> None:
    save_gguf(hf_model("llama", hidden_size=256, intermediate_size=512), tmp_path / "model.gguf", "Q8_0")
    model = fastattn.load(tmp_path / "model.gguf", dtype=dtype)
    blocks = []
    for attention, mlp in model.decoder.blocks:
        (qkv,), (gate_up,) = attention.qkv.weights, mlp.gate_up.weights
        rows = qkv.shape[0]
        v = dense(dequantize(slice_out(qkv, rows - 128, rows)))
        up = dense(dequantize(slice_out(gate_up, 512, 1024)).bfloat16())
        mixed = ColumnLinear(slice_out(qkv, 0, rows - 128), v), ColumnLinear(slice_out(gate_up, 0, 512), up)
        assert all(len(linear.weights) == 2 for linear in mixed)
        blocks.append((replace(attention, qkv=mixed[0]), replace(mlp, gate_up=mixed[1])))
    model.decoder.blocks = tuple(blocks)
    assert_equal_both_ways(model, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return fastattn.load(save_hf(hf_model("qwen3", seed=7), tmp_path_factory.mktemp("model")))


class Halves:
    """The policy `exact` under another name: only its sync points are known to the decoder."""

    def __init__(self, tiles: int = 1) -> None:
        self.tiles, self.exact = tiles, Exact()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.exact, name)

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> Exchange[Stream]:
        return self.exact.start(p, _Tiled(make, self.tiles), s, e, g)


class _Tiled:
    """A half-block whose partial result is asked for in tiles."""

    def __init__(self, make: Produce, tiles: int) -> None:
        self.make, self.tiles, self.rows, self.row_parallel = make, tiles, make.rows, make.row_parallel

    def partial(self, lo: int, hi: int, out: Tensor | None = None) -> Tensor:
        whole = torch.empty_like(self.make.hidden)  # type: ignore[attr-defined]
        ends = [lo + (hi - lo) * i // self.tiles for i in range(self.tiles + 1)]
        for first, last in pairwise(ends):
            if first < last:
                self.make.partial(first, last, whole[first:last])
        return whole

    def gemm_input(self, lo: int, hi: int) -> Tensor:
        return self.make.gemm_input(lo, hi)


def test_other_policies_get_half_blocks(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Halves()
    monkeypatch.setattr(model.decoder, "policy", lambda point: policy)
    assert_equal_both_ways(model, 2 * model.config.num_layers)


def asked(model: Model, lengths: tuple[int, ...]) -> bool:
    """Whether `next_tokens` answers; if not, nothing was done."""
    decoder, config = model.decoder, model.config
    heads = decoder.blocks[0][0].kv_heads
    cache = PagedKvCache(config.num_layers, 4, 4, heads, config.head_dim, dtype=model.dtype)
    for side in (cache.keys, cache.values):
        side.zero_()
    step = cache.reserve(SEQUENCES[: len(lengths)], lengths)
    before = dispatch.calls.copy()
    found = decoder.next_tokens(torch.zeros(sum(lengths), dtype=torch.int64), step, cache)
    assert (found is None) == (dispatch.calls == before)
    assert (found is None) == (not cache.keys.any() and not cache.values.any())
    return found is not None


def test_tokens_are_left_to_the_sampler(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a forward is no single call, or a sequence has several new tokens, nothing is done."""
    decoder = model.decoder
    decoder.fused = True
    assert asked(model, (1, 1))
    assert not asked(model, (2, 1))
    with fastattn.use_backend("reference"):
        assert not asked(model, (1,))
    monkeypatch.setattr(decoder, "fused", False)
    assert not asked(model, (1,))
    monkeypatch.setattr(decoder, "fused", True)
    policy = Halves()
    monkeypatch.setattr(decoder, "policy", lambda point: policy)
    assert not asked(model, (1,))


def test_among_other_ranks_no_policy_is_kept(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner asks under a new function for each sample."""
    monkeypatch.setattr(model.decoder, "fused", True)
    monkeypatch.setattr(model.decoder, "group", TPGroup(None, 0, 2, 1.0, (0.5, 0.5)))
    given = []
    for _ in range(3):

        def policy(point: Point) -> Exact:
            return Exact()

        given.append(weakref.ref(policy))
        model.decoder.policy, before = policy, model.decoder.policy
        assert not asked(model, (1,))
        model.decoder.policy = before
        del policy
    gc.collect()
    assert [kept() for kept in given] == [None] * 3


@pytest.mark.parametrize("vocab", [1, 7, 16, 1025, 5000])
def test_the_largest_logit(vocab: int, dtype: str, isa: str) -> None:
    """As numpy's argmax: the first of equal logits, NaN above all (-1). The head makes the logits."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    generator = torch.Generator().manual_seed(vocab)
    for odd in (None, float("nan"), float("inf"), -float("inf")):
        wanted = torch.randn(vocab, generator=generator).sub(9).to(kind)  # below zero, and some are equal
        if odd is not None:
            wanted[int(torch.randint(vocab, (1,), generator=generator))] = odd
        likeliest = int(wanted.float().numpy().argmax())
        assert _chosen(wanted) == (likeliest if wanted[likeliest].isfinite() else -1)


@pytest.mark.parametrize("vocab", [2, 7, 1025])
def test_the_largest_logit_of_ranks(vocab: int, dtype: str, isa: str) -> None:
    """The same from ranks that hold a part of the vocabulary each; every rank is told."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    world, slots, slot_bytes = 2, 2, 128
    memory = mmap.mmap(-1, kernels.SharedMemory.bytes_of(world, slots, slot_bytes))
    ranks = [kernels.SharedMemory(memory, rank, world, slots, slot_bytes) for rank in range(world)]
    generator = torch.Generator().manual_seed(vocab)

    def chosen(rank: int, wanted: Tensor) -> int:
        lo, hi = ((0, vocab // 2), (vocab // 2, vocab))[rank]
        step, token = _step(wanted[lo:hi], vocab, lo), torch.tensor([-9])
        step.next_tokens(torch.tensor([vocab - 1]), token, 1, ranks[rank], None)
        return int(token)

    with ThreadPoolExecutor(world) as pool:
        for odd in (None, float("nan"), float("inf"), "equal"):
            wanted = torch.randn(vocab, generator=generator).sub(9).to(kind)
            place = int(torch.randint(vocab, (1,), generator=generator))
            if odd == "equal":
                wanted[place] = wanted[vocab - 1] = 3
            elif odd is not None:
                wanted[place] = odd
            likeliest = int(wanted.float().numpy().argmax())
            found = list(pool.map(chosen, range(world), [wanted] * world))
            assert found == [likeliest if wanted[likeliest].isfinite() else -1] * world


def _step(logits: Tensor, vocabulary: int, first_token: int) -> Any:
    """A step of a decoder whose head has these logits: bias of a head of zeros."""
    kind = logits.dtype
    name, one = str(kind).removeprefix("torch."), torch.ones(16, dtype=kind)

    def zeros(rows: int, bias: Tensor | None = None) -> tuple[Any, ...]:
        return ("dense", torch.zeros(rows, 16, dtype=kind), None, None, None, 0, 0, 16, bias, False, None)

    embedding, norm = zeros(len(logits)), (one, 1e-5)
    decoder = kernels.Decoder(name, 16, 1, 1, 16, False, 1.0, vocabulary, first_token, embedding, norm)
    decoder.add_block(
        norm=norm, qkv=[zeros(48)], q_norm=None, k_norm=None, o=zeros(16), left=-1,
        mlp_norm=norm, gate_up=[zeros(32)], down=zeros(16),
    )  # fmt: skip
    cache, row = torch.zeros(1, 1, 4, 1, 16, dtype=kind), torch.zeros(1, 1, dtype=torch.int32)
    step = kernels.DecoderStep(
        decoder, cache, cache.clone(), row, row[0] + 1, torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0]), torch.tensor([0]), torch.ones(4, 8), torch.zeros(4, 8),
    )  # fmt: skip
    with pytest.raises(ValueError, match="decoder: no head"):
        step.next_tokens(torch.tensor([0]), torch.tensor([-9]), 1)
    decoder.set_head(zeros(len(logits), logits))
    return step


def _chosen(logits: Tensor) -> int:
    """The token after a step with these logits."""
    step, ids, token = _step(logits, len(logits), 0), torch.tensor([0]), torch.tensor([-9])
    for wrong, message in ((torch.tensor([1, 2]), "next: shape"), (torch.ones(1), "next: float32")):
        with pytest.raises(ValueError, match=message):
            step.next_tokens(ids, wrong, 1)
    step.next_tokens(ids, token, 1)
    return int(token)


def test_tiles_of_a_half_block_run_op_by_op(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = decode(model, fused=False)
    policy = Halves(tiles=2)
    monkeypatch.setattr(model.decoder, "policy", lambda point: policy)
    for a, b in zip(decode(model, fused=True), wanted, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_a_named_backend_is_obeyed(model: Model) -> None:
    before = dispatch.calls["cpu", "decoder"]
    with fastattn.use_backend("reference"):
        wanted = decode(model, fused=True)
    assert dispatch.calls["cpu", "decoder"] == before
    with fastattn.use_backend("cpu"):
        found = decode(model, fused=True)
    assert dispatch.calls["cpu", "decoder"] == before + len(found) - 2
    assert (found[0] - wanted[0]).abs().max() < 1e-4


def test_many_rows(model: Model) -> None:
    ids = [list(range(3, 200)), list(range(3, 90))]
    model.decoder.fused = False
    wanted = model.logits(ids)
    model.decoder.fused = True
    for a, b in zip(model.logits(ids), wanted, strict=True):
        assert torch.equal(a, b)


def test_a_model_that_is_dropped_is_freed(tmp_path: Path) -> None:
    model = fastattn.load(save_hf(hf_model("llama"), tmp_path))
    decode(model, fused=True)
    decoder = weakref.ref(model.decoder)
    del model
    gc.collect()
    assert decoder() is None


def test_a_decoder_without_blocks_is_refused(model: Model) -> None:
    weight = (model.decoder.norm.weight, 1e-5)
    embedding = ("dense", torch.zeros(8, 64), None, None, None, 0, 0, 64, None, False, None)
    empty = kernels.Decoder("float32", 64, 4, 4, 16, False, 1.0, 8, 0, embedding, weight)
    with pytest.raises(ValueError, match="decoder: no blocks"):
        kernels.DecoderStep(empty, *[torch.zeros(1)] * 9)


def test_reasons(model: Model) -> None:
    assert reasons_against(model.decoder) == []
    (attention, mlp), *rest = model.decoder.blocks
    table = model.decoder.embedding
    permuted = table.weight._replace(x_perm=torch.arange(table.weight.shape[1]))
    other = Decoder(
        model.config, VocabParallelEmbedding(permuted, [(0, 320)], table.group, table.dtype),
        [(attention, replace(mlp, align=Align(model.decoder.group, torch.zeros(160), [(0, 160)]))), *rest],
        model.decoder.norm, model.decoder.head, model.decoder.group, model.decoder.policy,
        model.decoder.schedule,
    )  # fmt: skip
    assert reasons_against(other) == [
        "x_perm: columns of the embedding in another order",
        "an exchange between the GEMMs of the MLP",
    ]


ACT_ORDER = {
    "gptq": Spec("gptq", act_order=True),
    "gptq-int8": Spec("gptq", 8, act_order=True),
    "asymmetric": Spec("compressed-tensors", 4, 32, True, False),
}


@pytest.mark.parametrize("layout", ["tp_aware", "local_sort"])
@pytest.mark.parametrize("kind", ACT_ORDER)
def test_act_order(kind: str, layout: str, dtype: str, isa: str, tmp_path: Path) -> None:
    """Layers whose columns are sorted gather their input natively, q, k, v together or one by one."""
    theirs = hf_model("llama", num_hidden_layers=2)
    save_quantized(theirs, tmp_path, ACT_ORDER[kind], dense=("0.self_attn.k_proj", "1.mlp.up_proj"))
    model = fastattn.load(tmp_path, dtype=dtype, layout=layout)
    for attention, mlp in model.decoder.blocks:
        assert any(w.x_perm is not None for w in attention.qkv.weights)
        assert (mlp.down.weight.x_perm is None) == (layout == "tp_aware")
    assert_equal_both_ways(model, 1)


@pytest.mark.parametrize(
    ("x_perm", "message"),
    [(torch.arange(63), "x_perm: shape"), (torch.arange(64).int(), "x_perm: int32, expected int64"),
     (torch.arange(64) + 1, "x_perm: value 64 at 63, expected 0 to 63"),
     (torch.arange(64), "embedding: x_perm")],
    ids=["short", "int32", "range", "embedding"],
)  # fmt: skip
def test_a_wrong_order_is_refused(x_perm: Tensor, message: str) -> None:
    embedding = ("dense", torch.zeros(8, 64), None, None, None, 0, 0, 64, None, False, x_perm)
    with pytest.raises(ValueError, match=message):
        kernels.Decoder("float32", 64, 4, 4, 16, False, 1.0, 8, 0, embedding, (torch.ones(64), 1e-5))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (1, torch.zeros(2, 4, 4, 2, 23), r"keys: shape \(2, 4, 4, 2, 23\), expected \(2, 4, 4, 2, 24\)"),
        (1, torch.zeros(2, 4, 4, 2, 24, dtype=torch.bfloat16), "keys: bfloat16, expected float32"),
        (2, torch.zeros(2, 5, 4, 2, 24), "values: shape"),
        (3, torch.full((1, 1), 4, dtype=torch.int32), r"block_table\[0, 0\] is 4, expected 0 to 3"),
        (3, torch.zeros(2, 1, dtype=torch.int32), "block_table: shape"),
        (4, torch.tensor([5], dtype=torch.int32), r"cache_seqlens\[0\] is 5, expected 0 to 4"),
        (5, torch.tensor([0, 2], dtype=torch.int32), r"cu_seqlens_q\[1\] is 2, but only 1 rows"),
        (5, torch.tensor([0, 0], dtype=torch.int32), "cu_seqlens: last value 0, expected 1"),
        (5, torch.tensor([0, 1]), "cu_seqlens: int64, expected int32"),
        (6, torch.tensor([16]), "positions: value 16 at 0, expected 0 to 15"),
        (7, torch.tensor([16]), "slots: value 16 at 0, expected below 16"),
        (8, torch.zeros(16, 13), "sin: shape|cos: 13 angles"),
    ],
)
def test_a_step_is_checked_before_it_runs(model: Model, field: int, value: Tensor, message: str) -> None:
    native = FusedDecoder(model.decoder)
    arguments = [
        native.weights, torch.zeros(2, 4, 4, 2, 24), torch.zeros(2, 4, 4, 2, 24),
        torch.zeros(1, 1, dtype=torch.int32), torch.tensor([1], dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0]), torch.tensor([0]), torch.zeros(16, 12),
        torch.zeros(16, 12),
    ]  # fmt: skip
    step = kernels.DecoderStep(*arguments)
    right = torch.zeros(1, 64)
    for wrong in (torch.zeros(2, 64), torch.zeros(1, 63), torch.zeros(1, 64, dtype=torch.bfloat16)):
        for half in (step.attention, step.mlp):
            with pytest.raises(ValueError, match="hidden: "):
                half(0, wrong, right, 1)
            with pytest.raises(ValueError, match="out: "):
                half(0, right, wrong, 1)
        with pytest.raises(ValueError, match="out: "):
            step.forward(torch.tensor([3]), wrong, 1)
    for ids in ([320], [-1], [1, 2]):
        with pytest.raises(ValueError, match="ids: "):
            step.forward(torch.tensor(ids), right, 1)
    with pytest.raises(ValueError, match="layer: 2, expected below 2"):
        step.mlp(2, right, right, 1)
    arguments[field] = value
    with pytest.raises(ValueError, match=message):
        kernels.DecoderStep(*arguments)
