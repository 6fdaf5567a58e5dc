"""`fastattn.attention` on random calls: every backend that takes a call, against the float64 oracle.

Accuracy rule: ``err(ours) <= 2 * err(plain torch in the same dtype) + eps``. The oracle itself is checked
against a triple loop written from the contract's words.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import UnsupportedError, dispatch, reference
from fastattn.attention import build_args

from . import naive
from .cases import DTYPES, HEAD_DIMS, LAYOUTS, Case, assert_accurate, int32, random_case, torch_math

#: What runs on a CPU; each takes the calls that it has no reason against.
ON_CPU = ("cpu", "sdpa", "reference")
SEEDS = range(10)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(case: Case, backend: str) -> None:
    """Asserts that the backend's result is accurate."""
    args = case.args()
    exact, exact_lse = reference.attention(args)
    yardstick, yardstick_lse = torch_math(args, split_scale=backend == "sdpa")
    result = fastattn.attention(case.q, case.k, case.v, **case.options, backend=backend)
    out, lse = result if case.options.get("return_lse") else (result, None)
    assert out.dtype == case.q.dtype
    assert_accurate(out, yardstick, exact, f"{backend} {case}")
    if lse is not None:
        assert lse.dtype == torch.float32
        assert_accurate(lse, yardstick_lse, exact_lse, f"{backend} lse {case}")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(layout: str, dtype: torch.dtype, backend: str) -> None:
    if dispatch.unavailable(backend):
        pytest.skip("; ".join(dispatch.unavailable(backend)))
    features = dispatch.op_table(backend)["attention"].features
    dims = random.Random(f"{layout} {dtype}")  # noqa: S311
    for seed in SEEDS:
        check(random_case(seed, layout, dtype, dims.choice(HEAD_DIMS)).limited_to(features), backend)


@pytest.mark.parametrize("backend", ON_CPU)
def test_every_head_dim(backend: str) -> None:
    if dispatch.unavailable(backend):
        pytest.skip("; ".join(dispatch.unavailable(backend)))
    for head_dim in range(1, 257, 1 if backend == "cpu" else 15):
        dtype = DTYPES[head_dim % 3]
        q, k, v = (torch.randn(1, n, h, head_dim).to(dtype) for n, h in ((3, 4), (19, 2), (19, 2)))
        check(Case(q, k, v, {"causal": True, "return_lse": False}), backend)


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    head_dim=st.integers(1, 256),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=120)
def test_dispatch_serves_or_refuses(layout: str, dtype: torch.dtype, head_dim: int, seed: int) -> None:
    """Without a name: the first backend without a reason runs, accurately; with none left, a refusal."""
    case = random_case(seed, layout, dtype, head_dim)
    why = dispatch.explain("attention", case.args().signature())
    able = [name for name in dispatch.AUTOMATIC if not why[name]]
    before = dict(dispatch.calls)
    if not able:
        with pytest.raises(UnsupportedError, match="no backend is left"):
            fastattn.attention(case.q, case.k, case.v, **case.options)
        return
    fastattn.attention(case.q, case.k, case.v, **case.options)
    ran = {key for key, n in dispatch.calls.items() if n != before.get(key, 0)}
    assert ran == {(able[0], "attention")}
    check(case, able[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle_against_triple_loop(layout: str) -> None:
    """The oracle agrees with naive.py to float64 rounding."""
    for seed in range(9):
        case = random_case(seed, layout, torch.float32, (1, 3, 8)[seed % 3])
        out, lse = reference.attention(case.args())
        naive_out, naive_lse = naive.attention(case.q, case.k, case.v, case.options)
        rows = out.reshape(-1, *out.shape[-2:]).numpy()
        np.testing.assert_allclose(rows, naive_out, rtol=1e-12, atol=1e-12, err_msg=str(case))
        packed = lse.transpose(-1, -2).reshape(-1, out.shape[-2]).numpy()
        np.testing.assert_allclose(packed, naive_lse, rtol=1e-12, atol=1e-12, err_msg=str(case))


# ---------------------------------------------------------------------------------- particular behaviours
@pytest.fixture(params=ON_CPU)
def backend(request: pytest.FixtureRequest) -> str:
    if dispatch.unavailable(request.param):
        pytest.skip("; ".join(dispatch.unavailable(request.param)))
    return request.param


def test_query_without_keys_is_zero(backend: str) -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 3, 2, 16)
    out = fastattn.attention(q, k, k, causal=True, backend=backend)
    assert torch.equal(out[:, :2], torch.zeros(2, 2, 4, 16))
    assert (out[:, 2:].abs().sum((-1, -2)) > 0).all()


LENGTHS = {
    "pages": {"block_table": int32([[2, 0], [1, 2]]), "cache_seqlens": int32([0, 7])},
    "lengths": {"cache_seqlens": int32([0, 7]), "cache_batch_idx": int32([2, 1])},
    "rows": {"cache_batch_idx": int32([2, 1])},
    "packed": {"cu_seqlens_q": int32([0, 3, 6]), "cu_seqlens_k": int32([0, 2, 9])},
}


@pytest.mark.parametrize("home", LENGTHS)
def test_padding_past_the_last_key_leaves_none(backend: str, home: str) -> None:
    """As in the empty slot of a batch that is padded on the left."""
    q, k, options = torch.randn(2, 3, 4, 16), torch.randn(3, 8, 2, 16), LENGTHS[home]
    if home == "packed":
        q, k = q.flatten(0, 1), k.flatten(0, 1)
    padded = [
        fastattn.attention(q, k, k, **options, cache_leftpad=int32([pad, 1]), backend=backend)
        for pad in (9, 0)
    ]
    first, second = (slice(0, 3), slice(3, 6)) if home == "packed" else (0, 1)
    assert not padded[0][first].any()
    assert torch.equal(padded[0][second], padded[1][second])


def test_no_keys_at_all(backend: str) -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 0, 2, 16)
    assert torch.equal(fastattn.attention(q, k, k, backend=backend), torch.zeros_like(q))


def test_no_queries(backend: str) -> None:
    q, k = torch.randn(2, 0, 4, 16), torch.randn(2, 7, 2, 16)
    assert fastattn.attention(q, k, k, backend=backend).shape == (2, 0, 4, 16)


def test_no_sequences(backend: str) -> None:
    q, k = torch.randn(0, 4, 4, 16), torch.randn(0, 7, 2, 16)
    assert fastattn.attention(q, k, k, causal=True, backend=backend).shape == (0, 4, 4, 16)


def test_rows_past_the_last_sequence_are_zero(backend: str) -> None:
    """A batch padded to a fixed number of rows: cu_seqlens ends before q does."""
    q, k = torch.randn(9, 4, 16), torch.randn(2, 7, 2, 16)
    out = fastattn.attention(q, k, k, cu_seqlens_q=int32([0, 2, 5]), backend=backend)
    assert torch.equal(out[5:], torch.zeros(4, 4, 16))
    expected = fastattn.attention(q[None, :2], k[:1], k[:1], backend=backend)
    torch.testing.assert_close(out[:2], expected[0])


@pytest.mark.parametrize("window", [(2**63 - 1, 2**63 - 1), (None, 2**62)], ids=["both", "right"])
def test_window_past_any_position_is_no_window(backend: str, window: tuple[int | None, int]) -> None:
    q, k = torch.randn(1, 40, 4, 16), torch.randn(1, 50, 2, 16)
    wide = fastattn.attention(q, k, k, window=window, backend=backend)
    torch.testing.assert_close(wide, fastattn.attention(q, k, k, backend=backend))


def test_broadcast_mask_equals_the_full_one(backend: str) -> None:
    q, k = torch.randn(2, 6, 4, 24), torch.randn(2, 11, 2, 24)
    mask = torch.rand(2, 1, 6, 11) > 0.4
    args = build_args(q, k, k, attn_mask=mask)
    if dispatch.reasons_against(backend, "attention", args.signature()):
        pytest.skip("takes no attn_mask")
    shared = fastattn.attention(q, k, k, attn_mask=mask, backend=backend)
    full = fastattn.attention(q, k, k, attn_mask=mask.expand(2, 4, 6, 11).contiguous(), backend=backend)
    torch.testing.assert_close(shared, full)


def test_large_scores_do_not_overflow(backend: str) -> None:
    q = torch.full((1, 2, 1, 64), 100.0)
    k = torch.full((1, 3, 1, 64), 100.0)
    k[:, 1] = -100.0
    v = torch.randn(1, 3, 1, 64)
    out = fastattn.attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, (v[:, :1] + v[:, 2:]).expand(1, 2, 1, 64) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_offsets_past_2_to_the_31(backend: str, dtype: torch.dtype) -> None:
    """Sequences and rows that lie more than 2^31 elements apart in one storage; few pages are touched."""
    batch_stride, row_stride = 2**31 + 4096, 2**29 + 128
    size = batch_stride + 5 * row_stride
    storage = torch.empty(size, dtype=dtype)
    k = storage.as_strided((2, 5, 2, 16), (batch_stride, row_stride, 16, 1))
    v = storage.as_strided((2, 5, 2, 16), (batch_stride, row_stride, 16, 1), 64)
    near_k, near_v = torch.randn(2, 5, 2, 16).to(dtype), torch.randn(2, 5, 2, 16).to(dtype)
    k.copy_(near_k)
    v.copy_(near_v)
    q = torch.randn(2, 3, 4, 16).to(dtype)
    far = fastattn.attention(q, k, v, causal=True, backend=backend)
    assert torch.equal(far, fastattn.attention(q, near_k, near_v, causal=True, backend=backend))
    table = int32([[1, 0], [0, 1]])
    lengths = int32([9, 7])
    paged = fastattn.attention(q, k, v, block_table=table, cache_seqlens=lengths, backend=backend)
    near = fastattn.attention(q, near_k, near_v, block_table=table, cache_seqlens=lengths, backend=backend)
    assert torch.equal(paged, near)


def test_inputs_are_left_alone(backend: str) -> None:
    for layout in LAYOUTS:
        case = random_case(3, layout, torch.float32, 24)
        if dispatch.reasons_against(backend, "attention", case.args().signature()):
            continue
        tensors = [case.q, case.k, case.v, *(t for t in case.options.values() if isinstance(t, torch.Tensor))]
        before = [t.clone() for t in tensors]
        fastattn.attention(case.q, case.k, case.v, **case.options, backend=backend)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors, before, strict=True))


PAGED = {"block_table": int32([[0, 1], [2, 1]]), "cache_seqlens": int32([9, 5])}
BAD_INDICES = {
    "page-past-the-end": (PAGED | {"block_table": int32([[0, 3], [2, 1]])}, "block_table"),
    "page-negative": (PAGED | {"block_table": int32([[0, 1], [-1, 1]])}, "block_table"),
    "paged-length": (PAGED | {"cache_seqlens": int32([17, 5])}, "cache_seqlens"),
    "negative-length": (PAGED | {"cache_seqlens": int32([-1, 5])}, "cache_seqlens"),
    "page-past-int32": (
        PAGED | {"block_table": torch.tensor([[0, 2**32 + 1], [2, 1]])},
        "block_table: values 0",
    ),
    "length-past-int32": (PAGED | {"cache_seqlens": torch.tensor([9, 2**32 + 5])}, "cache_seqlens: values 9"),
    "row-before-int32": (
        {"cache_batch_idx": torch.tensor([0, -(2**32)])},
        "cache_batch_idx: values -4294967296",
    ),
    "row": ({"cache_batch_idx": int32([0, 3])}, "cache_batch_idx"),
    "row-negative": ({"cache_batch_idx": int32([-1, 0])}, "cache_batch_idx"),
    "length": ({"cache_batch_idx": int32([0, 1]), "cache_seqlens": int32([8, 9])}, "cache_seqlens"),
    "leftpad-negative": (PAGED | {"cache_leftpad": int32([-1, 0])}, "cache_leftpad"),
    "cu-past-the-end": (PAGED | {"cu_seqlens_q": int32([0, 2, 7])}, "cu_seqlens_q"),
    "cu-falls": (PAGED | {"cu_seqlens_q": int32([0, 4, 3])}, "cu_seqlens_q"),
    "cu-starts-late": (PAGED | {"cu_seqlens_q": int32([1, 4, 6])}, "cu_seqlens_q"),
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_index_out_of_range_is_refused(backend: str, name: str) -> None:
    """Memory of another sequence, or of nobody, is never read."""
    options, argument = BAD_INDICES[name]
    q, k = torch.randn(2, 3, 4, 16), torch.randn(3, 8, 2, 16)
    q = q.flatten(0, 1) if "cu_seqlens_q" in options else q
    with pytest.raises(ValueError, match=f"^{argument}"):
        fastattn.attention(q, k, k, **options, backend=backend)


BAD_ARGUMENTS = {
    "dtype": ({"k": torch.ones(2, 8, 2, 16).half()}, "k: torch.float16, q is torch.float32"),
    "v-dtype": ({"v": torch.ones(2, 8, 2, 16).char(), "v_scale": torch.ones(2)}, "v: torch.int8, k is"),
    "rank": ({"q": torch.ones(6, 4, 16)}, r"q: 3 dimensions \(6, 4, 16\), expected \(batch"),
    "packed-rank": ({"cu_seqlens_q": int32([0, 3, 6])}, r"q: 4 dimensions .*expected \(total"),
    "head_dim": ({"q": torch.ones(2, 3, 4, 8)}, "k: head_dim 16, q has 8"),
    "no-head_dim": ({"v": torch.ones(2, 8, 2, 0)}, "head_dim: 16 of q, 0 of v"),
    "heads": ({"q": torch.ones(2, 3, 5, 16)}, "k: 2 heads, expected a divisor of q's 5"),
    "v-shape": ({"v": torch.ones(2, 7, 2, 16)}, r"v: \(2, 7, 2, 16\)"),
    "batch": ({"q": torch.ones(3, 3, 4, 16)}, "k: batch 2, q has 3"),
    "window": ({"window": (1, 2, 3)}, "window: "),
    "window-negative": ({"window": (-3, 0)}, "window: -3, each side is an integer >= 0"),
    "window-fraction": ({"window": (1.5, 0)}, r"window: 1\.5, each side is an integer"),
    "softcap": ({"softcap": float("nan")}, "softcap: nan"),
    "scale-nan": ({"scale": float("nan")}, "scale: nan, expected a finite number"),
    "scale-infinite": ({"scale": -float("inf")}, "scale: -inf, expected a finite number"),
    "slopes": ({"alibi_slopes": torch.ones(2)}, r"alibi_slopes: \(2,\), expected \(4,\) or \(2, 4\)"),
    "sinks": ({"sinks": torch.ones(2, 4)}, r"sinks: \(2, 4\), expected \(4,\)"),
    "mask-shape": ({"attn_mask": torch.ones(3, 7)}, r"attn_mask: \(3, 7\), expected broadcastable"),
    "mask-dtype": ({"attn_mask": torch.ones(3, 8).int()}, "attn_mask: torch.int32"),
    "mask-packed": (
        {"q": torch.ones(6, 4, 16), "cu_seqlens_q": int32([0, 3, 6]), "attn_mask": torch.ones(3, 8)},
        "attn_mask: needs dense q and k",
    ),
    "seqlens-shape": ({"cache_seqlens": int32([3])}, r"cache_seqlens: \(1,\), expected \(2,\)"),
    "seqlens-number": ({"cache_seqlens": 1 << 40}, r"cache_seqlens: 1099511627776, expected 0\.\.2147483647"),
    "seqlens-negative": ({"cache_seqlens": -1}, r"cache_seqlens: -1, expected 0\.\.2147483647"),
    "seqlens-dtype": ({"cache_seqlens": torch.ones(2)}, "cache_seqlens: torch.float32, expected int32"),
    "paged-without-lengths": ({"block_table": int32([[0], [1]])}, "block_table: needs cache_seqlens"),
    "paged-and-cu": (
        {"block_table": int32([[0], [1]]), "cache_seqlens": 3, "cu_seqlens_k": int32([0, 1, 2])},
        "cu_seqlens_k: k is paged",
    ),
    "page-size": (
        {"k": torch.ones(3, 0, 2, 16), "v": torch.ones(3, 0, 2, 16)} | PAGED,
        "k: pages of 0 rows, expected at least 1",
    ),
    "table-rank": ({"block_table": int32([0, 1]), "cache_seqlens": 3}, r"block_table: \(2,\)"),
    "rows-of-pages": (
        {"block_table": int32([[0], [1]]), "cache_seqlens": 3, "cache_batch_idx": int32([0, 1])},
        "cache_batch_idx: selects rows",
    ),
    "layout": ({"kv_layout": "hnd"}, "kv_layout: 'hnd', expected 'nhd' or 'npu_nz'"),
    "device": ({"sinks": torch.ones(4, device="meta")}, "sinks: on meta, q is on cpu"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_argument_is_named(name: str) -> None:
    change, message = BAD_ARGUMENTS[name]
    call = {"q": torch.ones(2, 3, 4, 16), "k": torch.ones(2, 8, 2, 16), "v": torch.ones(2, 8, 2, 16)} | change
    with pytest.raises(ValueError, match=message):
        fastattn.attention(**call)
