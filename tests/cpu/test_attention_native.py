"""The native attention kernels: each instruction set, one and two threads, against the float64 oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import native, reference

from ..api.cases import (
    DTYPES,
    HEAD_DIMS,
    LAYOUTS,
    Case,
    assert_accurate,
    cumulative,
    int32,
    random_case,
    torch_math,
)

ISAS = native.available_isas()


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_everywhere(case: Case) -> None:
    """Asserts accuracy of out and lse on every instruction set of this machine and on 1 and 2 threads."""
    options = {**case.options, "return_lse": True}
    case = case._replace(options=options)
    args = case.args()
    exact, exact_lse = reference.attention(args)
    yardstick, yardstick_lse = torch_math(args)
    for isa in ISAS:
        native.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out, lse = fastattn.attention(case.q, case.k, case.v, **options, backend="cpu")
            assert_accurate(out, yardstick, exact, f"{isa}, {threads} threads, {case}")
            assert_accurate(lse, yardstick_lse, exact_lse, f"lse, {isa}, {threads} threads, {case}")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(layout: str, dtype: torch.dtype) -> None:
    dims = random.Random(f"native {layout} {dtype}")  # noqa: S311
    for seed in range(1000, 1008):
        check_everywhere(random_case(seed, layout, dtype, dims.choice(HEAD_DIMS)))


def qkv(
    shape_q: tuple[int, ...], shape_k: tuple[int, ...], dtype: torch.dtype, v_dim: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape_v = (*shape_k[:-1], v_dim or shape_k[-1])
    return tuple(torch.randn(s).to(dtype) for s in (shape_q, shape_k, shape_v))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 32, 33])
def test_decode_splits_and_merges(group: int, dtype: torch.dtype) -> None:
    """Long caches are cut over the threads; unequal lengths, a sink and a window cross the cuts."""
    used = int32([2999, 1, 777])
    for options in (
        {},
        {"sinks": torch.randn(3 * group)},
        {"window": (900, 0), "alibi_slopes": torch.rand(3 * group) * 0.01},
        {"softcap": 20.0, "causal": True},
    ):
        q, k, v = qkv((3, 1, 3 * group, 64), (3, 3000, 3, 64), dtype)
        check_everywhere(Case(q, k, v, {"cache_seqlens": used, **options}))


@settings(max_examples=25, deadline=None)
@given(
    heads=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    queries=st.integers(1, 4),
    keys=st.integers(1, 700),
    dims=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1 << 30),
)
def test_decode_of_any_shape(
    heads: tuple[int, int], queries: int, keys: int, dims: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    """Odd groups of heads, head_dims apart from v_head_dims, steps and tails of every length."""
    torch.manual_seed(seed)
    (kv_heads, group), (dim, v_dim) = heads, dims
    q, k, v = qkv((2, queries, kv_heads * group, dim), (2, keys, kv_heads, dim), dtype, v_dim)
    check_everywhere(Case(q, k, v, {"causal": True}))


@pytest.mark.parametrize("order", ["rising", "falling"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_rescales_when_a_maximum_grows(dtype: torch.dtype, order: str) -> None:
    """Scores from -60 to 60, so that every step, or none after the first, moves the maximum."""
    q, k, v = qkv((1, 1, 8, 64), (1, 1500, 2, 64), dtype)
    slope = torch.linspace(-60.0, 60.0, 1500)
    # The first element of q and k alone decides; the others only disturb a little.
    q, k = q * 0.1, k * 0.1
    q[..., 0], k[..., 0] = 8.0, (slope if order == "rising" else -slope).to(dtype)[:, None]
    check_everywhere(Case(q, k, v, {"scale": 0.125}))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_decode_of_paged_heads_first_cache(dtype: torch.dtype) -> None:
    """Pages whose heads lie apart: (P, Hkv, page, D) seen as (P, page, Hkv, D)."""
    q = torch.randn(2, 2, 4, 80).to(dtype)
    k, v = (torch.randn(70, 2, 16, 80).to(dtype).transpose(1, 2) for _ in range(2))
    table = torch.randperm(70)[:64].int().view(2, 32)
    check_everywhere(
        Case(q, k, v, {"block_table": table, "cache_seqlens": int32([512, 399]), "causal": True})
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": True, "window": (100, 0)}, {"window": (3, 130)}, {}],
    ids=["causal", "sliding", "band", "full"],
)
def test_prefill_of_many_blocks(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Several blocks of queries and keys, and a last one that is not full, in each."""
    check_everywhere(Case(*qkv((1, 301, 6, 72), (1, 431, 2, 72), dtype, 100), options))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_mixed_prefill_and_decode(dtype: torch.dtype) -> None:
    """One packed call holds prompts, single tokens, empty sequences and chunks on a long cache."""
    q_lens, k_lens = [1, 140, 0, 3, 1, 33], [1500, 140, 0, 900, 0, 1200]
    q, k, v = qkv((sum(q_lens), 4, 64), (sum(k_lens), 2, 64), dtype)
    cu = {"cu_seqlens_q": cumulative(q_lens), "cu_seqlens_k": cumulative(k_lens)}
    check_everywhere(Case(q, k, v, {**cu, "causal": True}))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_without_keys(isa: str) -> None:
    """A row that sees nothing is 0 with lse -inf, or the sink; a mask of the lowest floats is an average."""
    native.set_isa(isa)
    q, k, v = qkv((1, 40, 2, 16), (1, 7, 2, 16), torch.float32)
    out, lse = fastattn.attention(q, k, v, causal=True, return_lse=True, backend="cpu")
    assert (out[:, :33] == 0).all()
    assert (lse[..., :33] == -torch.inf).all()
    assert out[:, 33:].isfinite().all()
    sinks = torch.tensor([0.5, -2.0])
    out, lse = fastattn.attention(q, k, v, causal=True, sinks=sinks, return_lse=True, backend="cpu")
    assert (out[:, :33] == 0).all()
    assert torch.equal(lse[0, :, :33], sinks[:, None].expand(2, 33))
    nothing = torch.full((1, 1, 1, 7), torch.finfo(torch.float32).min)
    out = fastattn.attention(q, k, v, attn_mask=nothing, backend="cpu")
    assert torch.allclose(out, v.mean(1, keepdim=True).expand_as(out), atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no sequences", "no queries"])
def test_empty_call(shape: tuple[int, int]) -> None:
    q, k, v = qkv((*shape, 4, 8), (shape[0], 5, 2, 8), torch.float32)
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend="cpu")
    assert out.shape == (*shape, 4, 8)
    assert lse.shape == (shape[0], 4, shape[1])


@pytest.mark.parametrize("q_len", [1, 40], ids=["decode", "prefill"])
def test_more_than_2_31_elements(q_len: int) -> None:
    """Offsets past 2^31 elements; the memory between them is never touched, so it costs only addresses."""
    far, page = 2**31 + 64, 4
    memory = torch.empty(2 * far, dtype=torch.bfloat16)
    k = memory.as_strided((2, page, 2, 32), (far, 64, 32, 1)).copy_(torch.randn(2, page, 2, 32))
    v = k.flip(1).contiguous()
    q = torch.randn(1, q_len, 2, 32).bfloat16()
    table, used = int32([[1, 0]]), int32([2 * page])
    out = fastattn.attention(q, k, v, block_table=table, cache_seqlens=used, backend="cpu")
    near = fastattn.attention(q, k.contiguous(), v, block_table=table, cache_seqlens=used, backend="cpu")
    assert torch.equal(out, near)
    rows = memory.as_strided((1, 2, 2, 32), (0, far, 32, 1))
    out = fastattn.attention(q, rows, rows, backend="cpu")
    assert torch.equal(out, fastattn.attention(q, rows.contiguous(), rows.contiguous(), backend="cpu"))


def bad_values() -> list[Any]:
    dense = qkv((2, 3, 2, 8), (2, 5, 1, 8), torch.float32)
    pages = qkv((2, 3, 2, 8), (4, 5, 1, 8), torch.float32)
    packed = qkv((6, 2, 8), (9, 1, 8), torch.float32)
    cu_q, cu_k = int32([0, 4, 6]), int32([0, 4, 9])
    table = int32([[0, 1], [2, 3]])
    return [
        pytest.param(
            dense,
            {"cache_seqlens": int32([5, 6])},
            r"cache_seqlens\[1\] is 6, expected 0 to 5",
            id="too long",
        ),
        pytest.param(
            dense, {"cache_seqlens": int32([-1, 2])}, r"cache_seqlens\[0\] is -1", id="negative length"
        ),
        pytest.param(
            dense, {"cache_leftpad": int32([0, -1])}, r"cache_leftpad\[1\] is -1, expected 0 to", id="pad"
        ),
        pytest.param(
            dense, {"cache_batch_idx": int32([0, 2])}, r"cache_batch_idx\[1\] is 2, expected 0 to 1", id="row"
        ),
        pytest.param(
            pages,
            {"block_table": int32([[0, 4], [1, 2]]), "cache_seqlens": int32([6, 1])},
            r"block_table\[0, 1\] is 4, expected 0 to 3",
            id="page",
        ),
        pytest.param(
            pages,
            {"block_table": table, "cache_seqlens": int32([6, 11])},
            r"cache_seqlens\[1\] is 11",
            id="past pages",
        ),
        pytest.param(
            packed,
            {"cu_seqlens_q": int32([0, 7, 6]), "cu_seqlens_k": cu_k},
            r"cu_seqlens_q\[2\] is 6, less",
            id="order",
        ),
        pytest.param(
            packed,
            {"cu_seqlens_q": cu_q, "cu_seqlens_k": int32([0, 4, 10])},
            r"cu_seqlens_k\[2\] is 10",
            id="total",
        ),
        pytest.param(
            packed,
            {"cu_seqlens_q": int32([1, 4, 6]), "cu_seqlens_k": cu_k},
            r"cu_seqlens_q\[0\] is 1",
            id="start",
        ),
    ]


@pytest.mark.parametrize(("tensors", "options", "message"), bad_values())
def test_bad_values_are_named(tensors: Any, options: dict[str, Any], message: str) -> None:
    """What would be read out of bounds is refused before anything is read."""
    with pytest.raises(ValueError, match=message):
        fastattn.attention(*tensors, **options, backend="cpu")


def test_pages_past_the_length_are_not_looked_at() -> None:
    q, k, v = qkv((1, 1, 2, 8), (2, 4, 1, 8), torch.float32)
    table = int32([[1, 999]])
    out = fastattn.attention(q, k, v, block_table=table, cache_seqlens=int32([4]), backend="cpu")
    assert torch.equal(out, fastattn.attention(q, k[1:], v[1:], backend="cpu"))
