"""Prefill against float64 on every layout, feature and head_dim; the work that it does, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_volta import emulator
from cuda_volta import prefill as prefill_calls
from cuda_volta.prefill import BLOCK_K, BLOCK_Q, FEATURES, HEAD_DIMS, PREFILL, prefill
from fastattn import reference
from fastattn.attention import build_args
from fastattn.spec import AttentionArgs
from tests.api.cases import LAYOUTS, assert_accurate, cumulative, int32, random_case, torch_math

from .calls import attention_call, no_host_reads

pytestmark = pytest.mark.toolchain
HALF = torch.float16


def check(a: AttentionArgs, device: torch.device) -> emulator.Report | None:
    """One call against the oracle and torch's own; the report of its launch, if it was emulated."""
    call = attention_call(a, device)
    with emulator.record() as reports, no_host_reads():
        out, lse = prefill(call)
    exact, exact_lse = reference.attention(a)
    plain, plain_lse = torch_math(a)
    assert_accurate(out.cpu(), plain, exact, a.signature())
    if a.return_lse:
        assert_accurate(lse.cpu(), plain_lse, exact_lse, a.signature())
    for report in reports:
        assert report.bank_conflicts == 0, report
    return reports[0] if reports else None


def half(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).half()


def dense(
    q_len: int, k_len: int, heads: int = 1, kv_heads: int = 1, head_dim: int = 64, **options: Any
) -> AttentionArgs:
    q, k, v = (half(1, n, h, head_dim, seed=n + i) for i, (n, h) in enumerate(
        ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))))  # fmt: skip
    return build_args(q, k, v, **options)


# ---------------------------------------------------------------------------------------------- correctness
@pytest.mark.parametrize("head_dim", [*HEAD_DIMS, 1, 40, 100, 136, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(layout: str, head_dim: int, device: torch.device) -> None:
    for seed in range(2):
        check(random_case(seed, layout, HALF, head_dim).args(), device)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    layout=st.sampled_from(LAYOUTS),
    head_dim=st.one_of(st.sampled_from(HEAD_DIMS), st.integers(1, 256)),
)
def test_any_call(seed: int, layout: str, head_dim: int, device: torch.device) -> None:
    check(random_case(seed, layout, HALF, head_dim).args(), device)


OPTIONS_OF_FEATURES: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": 5.0},
    {"alibi_slopes": torch.tensor([0.1, 0.4])},
    {"softcap": 5.0, "alibi_slopes": torch.tensor([0.1, 0.4])},
)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_variant_on_several_tiles(head_dim: int, features: int, device: torch.device) -> None:
    """Full and masked tiles, more than one block of queries, all of the causal bound's remainders."""
    options = {**OPTIONS_OF_FEATURES[features], "return_lse": True}
    for causal in (False, True):
        a = dense(200, 203, heads=2, kv_heads=1, head_dim=head_dim, causal=causal, **options)
        report = check(a, device)
        if report:
            assert report.variant == PREFILL[head_dim, features]


@pytest.mark.parametrize("k_len", [1, 31, 32, 33, 64, 127, 129, 257])
@pytest.mark.parametrize("q_len", [1, 31, 33, 127, 128, 129, 257])
def test_lengths_around_the_tiles(q_len: int, k_len: int, device: torch.device) -> None:
    """Fewer keys than causal queries: the first rows see none, give 0 and -inf."""
    for options in ({}, {"causal": True}, {"causal": True, "window": (40, None)}, {"window": (3, 5)}):
        check(dense(q_len, k_len, **options, return_lse=True), device)


@pytest.mark.parametrize("left", [None, 0, 1, 31, 32, 33, 200])
@pytest.mark.parametrize("right", [None, 0, 1, 31, 32, 33, 200])
def test_windows_around_the_tiles(left: int | None, right: int | None, device: torch.device) -> None:
    check(dense(150, 170, window=(left, right)), device)


@pytest.mark.parametrize("page", [1, 5, 16, 24, 32, 33, 64, 256])
def test_page_sizes(page: int, device: torch.device) -> None:
    """Pages that tiles divide, that divide tiles, and neither; in any order."""
    lengths, per_sequence = [170, 0, 131], -(-170 // page)
    pages = 3 * per_sequence + 1
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(page))[: 3 * per_sequence]
    k, v = half(pages, page, 2, 64, seed=1), half(pages, page, 2, 64, seed=2)
    table = order.to(torch.int32).view(3, per_sequence)
    q = half(3, 140, 4, 64)
    check(build_args(q, k, v, block_table=table, cache_seqlens=int32(lengths), causal=True), device)


def test_many_packed_sequences_of_unlike_lengths(device: torch.device) -> None:
    lengths_q, lengths_k = [0, 129, 1, 7, 260, 0, 33], [5, 129, 40, 0, 300, 0, 33]
    q, k, v = (
        half(sum(lengths_q), 4, 64),
        half(sum(lengths_k), 2, 64, seed=1),
        half(sum(lengths_k), 2, 64, seed=2),
    )
    cu = {"cu_seqlens_q": cumulative(lengths_q), "cu_seqlens_k": cumulative(lengths_k)}
    check(build_args(q, k, v, **cu, causal=True, return_lse=True), device)


@pytest.mark.parametrize("scale", [0.0, -0.125, 4.0, 1e-4])
def test_scales(scale: float, device: torch.device) -> None:
    # Where all scores are zero torch's softcap is exact, and the rule allows no error of tanh.
    capped = [{"softcap": 3.0}] if scale else []
    for options in ({}, *capped, {"sinks": torch.tensor([0.5])}):
        check(dense(40, 70, scale=scale, **options, return_lse=True), device)


def test_large_scores_neither_overflow_nor_vanish(device: torch.device) -> None:
    """Maxima that rise late, tiles that all but vanish beside another, values at the end of the range."""
    q, k, v = (
        half(1, 130, 1, 64, scale=8.0),
        half(1, 200, 1, 64, seed=1, scale=8.0),
        half(1, 200, 1, 64, seed=2),
    )
    k[:, 150:] *= 4.0
    v[:, ::7] = 60000.0
    check(build_args(q, k, v, return_lse=True), device)
    check(build_args(q, k.flip(1), v, causal=True, return_lse=True), device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_sequences_than_a_grid_has_blocks(
    layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65535 along z; lowered here, since the emulator runs every block."""
    monkeypatch.setattr(prefill_calls, "GRID_LIMIT", 1)
    drawn = (random_case(seed, layout, HALF, 64).args() for seed in range(20))
    a = next(a for a in drawn if attention_call(a).batch > 1)
    with emulator.record() as reports:
        check(a, device)
    batch = attention_call(a).batch
    assert [r.grid[2] for r in reports] == [1] * (batch if device.type == "cpu" else 0)


@pytest.mark.parametrize("value", [500.0, 4000.0, 4793.0])
def test_scores_whose_floats_are_far_apart(value: float, device: torch.device) -> None:
    """From 2^24 on a reference cannot hold its shift exactly: here up to 2^27.98, where halves overflow."""
    q, k = torch.full((1, 40, 1, 64), value).half(), torch.full((1, 70, 1, 64), value).half()
    k[:, ::3] *= 0.5
    a = build_args(q, k, half(1, 70, 1, 64), return_lse=True)
    out, lse = prefill(attention_call(a, device))
    exact, exact_lse = reference.attention(a)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=2**-20, atol=0.0)


# ------------------------------------------------------------------------------------------- work, counted
def tiles(q_len: int, k_len: int, left: int | None, right: int | None, rows: int = BLOCK_Q) -> int:
    """Tiles of keys that hold one that some of ``rows`` queries may see, over all of them."""
    total = 0
    for first in range(0, q_len, rows):
        last = min(first + rows, q_len) - 1
        lo = 0 if left is None else max(0, first + k_len - q_len - left)
        hi = k_len - 1 if right is None else min(k_len - 1, last + k_len - q_len + right)
        total += hi // BLOCK_K - lo // BLOCK_K + 1 if hi >= lo else 0
    return total


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 0.5),
        ({"softcap": 30.0}, 0.5),
        ({"causal": True}, 1.5),
        ({"causal": True, "window": (511, 0)}, 1.5),
        ({"causal": True, "alibi_slopes": torch.tensor([2.0**-1])}, 0.2),
        ({"causal": True, "alibi_slopes": torch.tensor([2.0**-4])}, 0.2),
        ({"causal": True, "alibi_slopes": torch.tensor([2.0**-8])}, 1.0),
    ],
    ids=["plain", "softcap", "causal", "window", "alibi 1/2", "alibi 1/16", "alibi 1/256"],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_references_hardly_move_after_the_first_tile(
    head_dim: int, options: dict[str, Any], most: float
) -> None:
    """What the issue simulator takes for granted: O is rescaled once a warp. ``most``: as often again.

    Under a causal bound the first tile shows some rows few keys, so the second often moves references too.
    Equal scores move them in the first tile only. Every other rescaling exchanges maxima over two pairs of
    lanes, four rows a lane, or two and O's factors.
    """
    q, k, v = (half(1, n, 1, head_dim, seed=n) for n in (256, 1024, 1025))
    level = options | ({"alibi_slopes": torch.zeros(1)} if "alibi_slopes" in options else {})
    random = check(build_args(q, k, v[:, :1024], **options), torch.device("cpu"))
    equal = check(build_args(q, 0 * k, v[:, :1024], **level), torch.device("cpu"))
    assert random
    assert equal
    rescalings = (random.shuffles - equal.shuffles) / (6 if head_dim > 128 else 8)
    warps = (256 // BLOCK_Q) * (random.variant.threads // 32)
    assert 0 <= rescalings <= most * warps


@pytest.mark.parametrize("q_len", [1, 33, 100, 129])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_warps_past_the_last_query_compute_nothing(head_dim: int, q_len: int) -> None:
    report = check(dense(q_len, 300, head_dim=head_dim, return_lse=True), torch.device("cpu"))
    assert report
    rows = BLOCK_Q // (report.variant.threads // 32)
    assert report.mma == -(-q_len // rows) * -(-300 // BLOCK_K) * 2 * rows * BLOCK_K * head_dim // 1024


@pytest.mark.parametrize(
    ("options", "bounds"),
    [
        ({}, (None, None)),
        ({"causal": True}, (None, 0)),
        ({"causal": True, "window": (64, None)}, (64, 0)),
        ({"window": (10, 20)}, (10, 20)),
    ],
    ids=["plain", "causal", "causal window", "window"],
)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_only_tiles_that_are_seen_are_computed(
    head_dim: int, options: dict[str, Any], bounds: tuple[int | None, int | None]
) -> None:
    """Both products of a warp's tile are 2 * rows * 32 * head_dim multiply-adds, an mma is 1024."""
    report = check(dense(384, 448, head_dim=head_dim, **options), torch.device("cpu"))
    assert report
    warps = report.variant.threads // 32
    rows = BLOCK_Q // warps
    assert report.mma == tiles(384, 448, *bounds, rows) * 2 * rows * BLOCK_K * head_dim // 1024
    seen = tiles(384, 448, *bounds)
    # Two for each tile; those of the first tile's loads come once a block.
    assert report.block_barriers <= warps * (2 * seen + 3 * 384 // BLOCK_Q)
