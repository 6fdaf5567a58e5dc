"""Split-KV decode against float64, in the emulator."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_volta import emulator
from cuda_volta.attention import attention
from cuda_volta.attention_params import AttentionCall
from cuda_volta.decode import decode, num_splits
from cuda_volta.prefill import prefill
from fastattn import reference
from fastattn.attention import build_args
from fastattn.spec import AttentionArgs
from tests.api.cases import LAYOUTS, assert_accurate, cumulative, int32, random_case, torch_math

from .calls import attention_call, no_host_reads

pytestmark = pytest.mark.toolchain
HALF = torch.float16
HEAD_DIMS = (32, 64, 96, 128, 160, 192, 256, 1, 40, 100)


def check(a: AttentionArgs, splits: int | None = None) -> list[emulator.Report]:
    """One call against the oracle and torch's own; returns the reports of its launches."""
    with emulator.record() as reports, no_host_reads():
        out, lse = decode(attention_call(a), splits)
    exact, exact_lse = reference.attention(a)
    plain, plain_lse = torch_math(a)
    assert_accurate(out, plain, exact, a.signature())
    if a.return_lse:
        assert_accurate(lse, plain_lse, exact_lse, a.signature())
    assert sum(report.bank_conflicts for report in reports) == 0
    return reports


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(layout, head_dim):
    for seed in range(2):
        check(random_case(seed, layout, HALF, head_dim).args(), splits=(None, 3)[seed])


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from(LAYOUTS),
    st.sampled_from((64, 128, 7)),
    st.sampled_from((None, 2, 7)),
)
def test_any_call(seed, layout, head_dim, splits):
    check(random_case(seed, layout, HALF, head_dim).args(), splits)


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (8, 1), (9, 1), (16, 1), (20, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("queries", [1, 2, 3, 5])
def test_query_heads_and_queries_are_packed(heads, queries):
    """Up to 16 rows share a block, and with it one read of the keys."""
    q, kv_heads = normal(2, queries, heads[0], 64), heads[1]
    k, v = normal(2, 90, kv_heads, 64, seed=1), normal(2, 90, kv_heads, 64, seed=2)
    (report,) = check(build_args(q, k, v, causal=True, return_lse=True))
    assert report.grid == (2 * kv_heads * -(-queries * heads[0] // kv_heads // 16), 1, 1)


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_every_feature_at_once_over_splits(splits):
    """Splits without a visible key, sinks that enter once, and merging by the log-sum-exp."""
    g = torch.Generator().manual_seed(3)
    q, k, v = normal(2, 2, 6, 96), normal(2, 700, 2, 96, seed=1), normal(2, 700, 2, 72, seed=2)
    options = {
        "cache_seqlens": int32([700, 433]), "cache_leftpad": int32([0, 31]), "window": (300, None),
        "causal": True, "softcap": 20.0, "alibi_slopes": torch.rand(2, 6, generator=g) * 0.02,
        "sinks": torch.randn(6, generator=g),
        "attn_mask": torch.randn(2, 1, 2, 700, generator=g), "k_scale": torch.tensor([0.5, 2.0]),
        "v_scale": torch.tensor([3.0, 0.25]), "return_lse": True,
    }  # fmt: skip
    reports = check(build_args(q, k, v, **options), splits)
    assert [r.variant.entry for r in reports] == (["decode"] if splits == 1 else ["decode", "combine"])


def test_a_mask_of_the_lowest_finite_values_is_no_mask_of_nothing():
    """Such masks hide padding; a row that has no other key is uniform, as in every float64 softmax."""
    q, k, v = normal(1, 1, 2, 32), normal(1, 20, 1, 32, seed=1), normal(1, 20, 1, 32, seed=2)
    for dtype in (torch.float32, HALF):
        lowest = torch.finfo(dtype).min
        mask = torch.full((1, 2, 1, 20), lowest, dtype=dtype)
        mask[:, 1, :, 5:9] = 0.0
        check(build_args(q, k, v, attn_mask=mask, return_lse=True))
    hidden = torch.zeros(1, 2, 1, 20, dtype=torch.bool)
    hidden[:, 1, :, 3] = True
    check(build_args(q, k, v, attn_mask=hidden, return_lse=True), splits=4)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 128), (4, 128), (8, 64), (16, 128), (4, 256)], ids=str)
def test_a_long_cache_is_read_once(paged, heads, head_dim):
    """16K keys: every byte that global memory moves, partial results included, within 2 % of the cache."""
    keys, page = 16384, 16
    q, k, v = (
        normal(1, 1, heads, head_dim),
        normal(1, keys, 1, head_dim, seed=1),
        normal(1, keys, 1, head_dim, seed=2),
    )
    options = {}
    if paged:
        order = torch.randperm(keys // page, generator=torch.Generator().manual_seed(4)).int()
        options = {"block_table": order[None], "cache_seqlens": int32([keys])}
        k, v = (t.view(keys // page, page, 1, head_dim) for t in (k, v))
    reports = check(build_args(q, k, v, **options))
    assert len(reports) == 2
    moved = sum(r.global_bytes("global load") + r.global_bytes("global store") for r in reports)
    assert moved <= 1.02 * 2 * k.numel() * k.element_size()


@pytest.mark.parametrize("sms", [1, 5, 80, 108])
def test_splits(sms):
    """Never so short that partial results weigh in, never more than the machine has use for."""
    for units in (1, 3, 8, 64, 80, 81, 500):
        for keys in (0, 100, 5000, 16384, 131072):
            for rows in (1, 4, 16):
                splits = num_splits(units, keys, rows, sms)
                assert splits == 1 or (splits * (128 + 176 * rows) <= keys and splits <= sms)


def test_splits_fill_a_v100():
    assert num_splits(8, 131072, 4, 80) == 10  # Llama 8B's KV heads, in one wave
    assert num_splits(80, 131072, 4, 80) == 1


def test_repeated_calls_give_the_same_bits():
    q, k, v = normal(1, 1, 8, 128), normal(1, 3000, 2, 128, seed=1), normal(1, 3000, 2, 128, seed=2)
    call = attention_call(build_args(q, k, v))
    assert torch.equal(decode(call, 6)[0], decode(call, 6)[0])


WILD = int32([-(2**31), -1, 2**31 - 1, 1 << 20])


@pytest.mark.parametrize("splits", [1, 3])
def test_hostile_indices_never_leave_the_tensors(splits):
    """Whatever lengths, pages, rows and positions say, the emulator sees no access outside."""
    q = normal(4, 2, 4, 64)
    pages = normal(6, 5, 2, 64, seed=1), normal(6, 5, 2, 64, seed=2)
    rows = normal(4, 30, 2, 64, seed=3), normal(4, 30, 2, 64, seed=4)
    packed = normal(30, 2, 64, seed=5), normal(30, 2, 64, seed=6)
    packed_q = q.flatten(0, 1)
    wild_keys = int32([7, -3, 2**31 - 1, -(2**31), 29])
    wild_queries = int32(
        [-(2**31), 3, 5, 100, 2**31 - 1]
    )  # rising: two sequences in one row would race for it
    lengths = int32([30, 29, 1, 0])
    calls = [
        build_args(q, *pages, block_table=WILD[:, None].expand(4, 6).contiguous(), cache_seqlens=lengths),
        build_args(q, *pages, block_table=torch.zeros(4, 6, dtype=torch.int32), cache_seqlens=WILD),
        build_args(q, *rows, cache_seqlens=WILD, causal=True),
        build_args(q, *rows, cache_seqlens=lengths, cache_leftpad=WILD),
        build_args(q, *rows, cache_batch_idx=WILD),
        build_args(q, *rows, q_pos0=WILD, k_pos0=WILD.flip(0), window=(3, 1 << 40), causal=True),
        build_args(q, *rows, q_pos0=WILD, k_pos0=WILD.flip(0), window=(1 << 40, 5),
                   alibi_slopes=torch.ones(4)),
        build_args(packed_q, *packed, cu_seqlens_q=wild_queries, cu_seqlens_k=wild_keys),
        build_args(packed_q, *packed, cu_seqlens_q=wild_queries, cu_seqlens_k=cumulative([8, 7, 7, 8]),
                   cache_seqlens=WILD),
        build_args(q, *rows, attn_mask=torch.zeros(4, 4, 2, 30), cache_seqlens=WILD, cache_leftpad=WILD),
    ]  # fmt: skip
    for a in calls:
        with emulator.blocks_may_collide():  # overlapping sequences write the same rows
            out, _ = decode(attention_call(a), splits)
        assert torch.isfinite(out).all()


def test_nothing_to_attend():
    q, k = normal(2, 1, 4, 64), normal(2, 0, 2, 64)
    out, lse = decode(attention_call(build_args(q, k, k, return_lse=True)))
    assert not out.any()
    assert (lse == -torch.inf).all()
    for empty in (q[:0], q[:, :0]):
        keys = normal(empty.shape[0], 5, 2, 64)
        assert decode(attention_call(build_args(empty, keys, keys)))[0].shape == empty.shape


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", [(0, 16, 2, 64), (4, 0, 2, 64)], ids=["no pages", "empty pages"])
def test_a_cache_without_rows(shape, splits):
    """Lengths and pages that claim keys all the same: none is read, none is seen."""
    q, k = normal(2, 1, 4, 64), normal(*shape)
    base = AttentionCall(q, k, k, 0.125, seqused_k=int32([16, 3]), return_lse=True)
    calls = [base._replace(block_table=torch.zeros(2, 3, dtype=torch.int32))]
    if not shape[0]:
        calls.append(base._replace(cache_batch_idx=int32([0, 1])))
    for call in calls:
        for run in (lambda c: decode(c, splits), prefill):
            out, lse = run(call)
            assert not out.any()
            assert (lse == -torch.inf).all()


@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0, 1e4, 1e7])
def test_a_cap_far_above_the_scores_changes_nothing_else(cap):
    """The error of tanh must not grow with the cap that multiplies it."""
    q, k, v = normal(1, 2, 4, 64), normal(1, 300, 2, 64, seed=1), normal(1, 300, 2, 64, seed=2)
    a = build_args(q, k, v, softcap=cap, return_lse=True)
    exact, exact_lse = reference.attention(a)
    for run in (decode, prefill):
        out, lse = run(attention_call(a))
        torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_nan_is_not_lost(splits):
    """A query that is not a number makes its own row so, whether or not it saw a key beside."""
    q, k, v = normal(1, 1, 4, 64), normal(1, 1000, 2, 64, seed=1), normal(1, 1000, 2, 64, seed=2)
    q[0, 0, 2, 5] = torch.nan
    clean = q.nan_to_num(0.0)
    for options in ({}, {"sinks": torch.zeros(4)}, {"window": (600, 0)}):
        out, lse = decode(attention_call(build_args(q, k, v, **options, return_lse=True)), splits)
        want, want_lse = decode(attention_call(build_args(clean, k, v, **options, return_lse=True)), splits)
        assert out[0, 0, 2].isnan().all()
        assert lse[0, 2].isnan().all()
        assert torch.equal(out[0, 0, [0, 1, 3]], want[0, 0, [0, 1, 3]])
        assert torch.equal(lse[0, [0, 1, 3]], want_lse[0, [0, 1, 3]])


BASE = build_args(normal(1, 1, 2, 64), normal(1, 9, 1, 64), normal(1, 9, 1, 64))
BAD = {
    "q: torch.bfloat16, expected torch.float16; Volta has no bfloat16: convert with .half()": {
        "q": BASE.q.bfloat16()
    },
    "k: torch.float32, expected torch.float16": {"k": BASE.k.float()},
    "q: 65536 heads, expected at most 65535": {"q": normal(1, 1, 1, 64).expand(1, 1, 65536, 64)},
    "k: 0 heads, expected a divisor of q's 2": {"k": BASE.k[:, :, :0], "v": BASE.v[:, :, :0]},
    "v: head_dim 257, expected 1..256": {"v": normal(1, 9, 1, 257)},
    "q: stride 2 in the last dimension, expected 1": {"q": normal(1, 1, 2, 128)[..., ::2]},
    "attn_mask: torch.float64": {"attn_mask": torch.zeros(1, 2, 1, 9).double()},
    "seqused_k: torch.int64": {"seqused_k": torch.zeros(1, dtype=torch.int64)},
    "sinks: torch.float16": {"sinks": torch.zeros(2, dtype=HALF)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        attention(attention_call(BASE._replace(**BAD[message])))
