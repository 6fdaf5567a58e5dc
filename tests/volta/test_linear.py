"""Grouped low-bit linear layers and embedding rows against float64, in the emulator."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cuda_volta import emulator
from cuda_volta.embedding import embedding
from cuda_volta.linear import ANY_GROUPS, FEW_ROWS, LINEAR, ROWS, dense, few_rows_kernel, linear, num_splits
from cuda_volta.variant import KERNELS
from cuda_volta.weights import dequantize
from fastattn import reference_ops
from fastattn.quant import packed
from fastattn.spec import LinearArgs, PackedWeight
from tests.ops.runners import assert_accurate, random
from tests.ops.weights import QUANTIZED, make

from .weights import grouped

pytestmark = pytest.mark.toolchain
HALF = torch.float16
FORMATS = QUANTIZED | {"int8 x_perm bfloat16 bias": {"x_perm": True, "bias": torch.bfloat16}}
ODD = [kind for kind in FORMATS if any(odd in kind for odd in ("int4 g16", "at 16", "at 5", "at 7", "g_idx"))]


@cache
def weight(kind: str, out: int, inn: int) -> PackedWeight:
    fmt = kind.split(maxsplit=1)[0]
    return make(fmt, out, (inn + 31) // 32 * 32 if fmt == "int4" else inn, **FORMATS[kind])


def check(w: PackedWeight, x: torch.Tensor) -> list[emulator.Report]:
    """One product against float64 and against torch's own; returns the reports of its launches."""
    args = LinearArgs(x, w)
    with emulator.record() as reports:
        ours = linear(x, grouped(w))
    bias = None if w.bias is None else w.bias.float()
    plain = F.linear(x.float(), packed.dequantize(w).half().float(), bias).half()  # torch's weights are half
    assert_accurate(ours, plain, reference_ops.linear(args))
    # Of columns in no order, four quadpairs may want four groups whose scales share banks.
    free = [r for r in reports if r.variant.entry != "linear_any_groups"]
    assert sum(report.bank_conflicts for report in free) == 0
    return reports


@pytest.mark.parametrize("kind", FORMATS)
def test_linear(kind):
    w = weight(kind, 37, 208)
    kernels = ANY_GROUPS if kind in ODD else LINEAR
    assert few_rows_kernel(grouped(w), 1) == kernels[8 if "int8" in kind else 4]
    for rows in (1, 2, 7, 8, 9, 16, 17, 65):
        check(w, random(rows, w.shape[1], seed=rows, dtype=HALF))
    assert linear(random(0, w.shape[1], seed=0, dtype=HALF), grouped(w)).shape == (0, 37)


@pytest.mark.parametrize("kind", ["int4", "int8", "int4 x_perm bias", "int8 no mins"])
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (64, 512), (65, 1024), (130, 1600), (8, 4096)], ids=str)
def test_shapes_of_the_weight(kind, shape):
    check(weight(kind, *shape), random(5, shape[1], seed=1, dtype=HALF))


@pytest.mark.parametrize("inn", [1, 15, 31, 33, 65, 250, 257])
def test_widths_that_are_no_whole_chunk(inn):
    for kind in ("int8", "int8 g16 float32"):
        for rows in (1, 4):
            check(weight(kind, 6, inn), random(rows, inn, seed=rows, dtype=HALF))


@pytest.mark.parametrize("kind", ["int4 x_perm bias", "int8 no mins", "int4 g_idx"])
def test_many_rows_are_cublas_work(kind):
    w = weight(kind, 37, 208)
    most = ROWS if kind in ODD else FEW_ROWS
    for rows in (most, most + 1):
        names = {r.variant.entry for r in check(w, random(rows, w.shape[1], seed=rows, dtype=HALF))} - {
            "permute"
        }
        few = "linear_any_groups" if kind in ODD else "linear"
        assert names == ({few} if rows == most else {"dequantize"})


def test_an_act_order_weight_of_float32_scales():
    w = make("int4", 70, 1024, group=128, scale_dtype=torch.float32, x_perm=True, bias=torch.float32)
    for rows in (1, 12):
        check(w, random(rows, 1024, seed=rows, dtype=HALF))
        check(w._replace(x_perm=w.x_perm.int()), random(rows, 1024, seed=rows, dtype=HALF))


def test_groups_of_any_size():
    for group, offset, inn in ((96, 32, 1600), (4096, 4064, 1024), (1 << 15, 0, 640), (1 << 20, 64, 640)):
        w = make("int4", 20, inn, group=group, offset=offset)
        assert few_rows_kernel(grouped(w), 1) == LINEAR[4]
        check(w, random(3, inn, seed=1, dtype=HALF))
    w = make("int4", 9, 640, group=1 << 15, offset=(1 << 15) - 32)  # no exact division by multiplication
    assert few_rows_kernel(grouped(w), 1) == ANY_GROUPS[4]
    check(w, random(3, 640, seed=1, dtype=HALF))


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_more_groups_than_shared_memory_holds(fmt):
    """Sorted columns, of which a panel has few groups; others, whose scales are read where they lie."""
    rng = torch.Generator().manual_seed(0)
    w = make(fmt, 70, 1536, group=16, g_idx=True)
    assert w.tensors["scales"].shape[1] == 96
    runs = torch.randint(0, 30, (96,), generator=rng).cumsum(0)
    even = torch.arange(1536) // 16
    uneven = torch.bucketize(torch.arange(1536) * int(runs[-1]) // 1536, runs, right=True)
    backwards = even.flip(0)
    for g_idx in (even, uneven, backwards, w.g_idx):
        piece = w._replace(g_idx=g_idx.int())
        for rows in (1, 11):
            check(piece, random(rows, 1536, seed=rows, dtype=HALF))


def test_a_piece_of_an_act_order_matrix_is_read_without_conflicts():
    w = make("int4", 64, 1024, group=64, g_idx=True)
    piece = w._replace(g_idx=(torch.arange(1024) // 57).clamp(max=15).int())  # no run of whole chunks
    reports = check(piece, random(16, 1024, seed=1, dtype=HALF))
    assert [(r.variant.entry, r.bank_conflicts) for r in reports[:1]] == [("linear_any_groups", 0)]


def test_splits_are_added_in_order_and_the_bias_once():
    w = make("int4", 64, 4096, group=128, bias=torch.float32)
    x = random(3, 4096, seed=1, dtype=HALF)
    assert [r.variant.entry for r in check(w, x)] == ["linear", "split_sum"]
    assert torch.equal(linear(x, grouped(w)), linear(x, grouped(w)))


@pytest.mark.parametrize("blocks", [1, 7, 48, 64, 80, 81, 160, 300])
def test_splits_give_every_sm_two_blocks_and_no_more(blocks):
    for columns in (32, 1000, 4096, 28672):
        splits = num_splits(blocks, columns, 80)
        most = max(1, columns // 512)
        assert 1 <= splits <= most
        assert splits == 1 or blocks * splits <= 160
        assert splits == most or blocks * (splits + 1) > 160


@pytest.mark.parametrize(
    ("fmt", "group", "offset"),
    [("int4", 128, 0), ("int4", 256, 128), ("int4", 1024, 384), ("int4", 64, 32), ("int8", 64, 0)],
)
def test_a_block_takes_panel_after_panel(fmt, group, offset, monkeypatch):
    monkeypatch.setattr("cuda_volta.linear.num_splits", lambda *_: 1)
    w = make(fmt, 130, 2720, group=group, offset=offset)
    for rows in (3, 16):
        check(w, random(rows, 2720, seed=rows, dtype=HALF))


@pytest.mark.parametrize(("fmt", "group"), [("int4", 128), ("int4", 32), ("int8", 128)])
def test_the_codes_are_read_once_in_whole_sectors(fmt, group):
    out, inn = 256, 2048
    w = make(fmt, out, inn, group=group)
    for rows in (1, 16):
        (report, *_) = check(w, random(rows, inn, seed=rows, dtype=HALF))
        (stream,) = [line for line in report.lines if "ldg128_stream" in source(line)]
        assert stream.bytes == 32 * stream.sectors == w.tensors["codes"].numel()


def source(line: emulator.Line) -> str:
    return (KERNELS / line.file).read_text().splitlines()[line.line - 1]


def test_pieces_of_a_matrix_sum_to_the_whole():
    w = make("int4", 24, 256, group=64)
    x = random(3, 256, seed=5, dtype=HALF)
    whole = reference_ops.linear(LinearArgs(x, w))
    total = torch.zeros(3, 24, dtype=torch.float64)
    for lo, hi in pairwise([0, 32, 83, 160, 249, 256]):
        piece = packed.slice_in(w, lo, hi)
        check(piece, x[:, lo:hi])
        total += linear(x[:, lo:hi], grouped(piece)).double()
    assert float((total - whole).abs().max()) <= 5 * torch.finfo(HALF).eps * float(whole.abs().max())


def test_strided_input_and_a_cut_weight():
    w = packed.slice_out(packed.slice_in(make("int4", 40, 256, bias=torch.float32), 64, 192), 3, 33)
    w = w._replace(bias=random(60, seed=2)[::2])
    check(w, random(5, 300, seed=1, dtype=HALF)[:, 100:228])
    check(w, random(5, 304, seed=1, dtype=HALF)[:, 104:232])


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(value):
    for kind in ("int4", "int8 no mins", "int4 cut at 5"):
        w = weight(kind, 37, 203)
        for column in (0, 100, w.shape[1] - 1):
            x = random(3, w.shape[1], seed=column, dtype=HALF)
            x[1, column] = value
            y = linear(x, grouped(w))
            assert not torch.isfinite(y[1]).any()
            assert torch.isfinite(y[[0, 2]]).all()


@settings(max_examples=40)
@example(1, 1, 1, 32, 0, True, "int8", HALF, False, False, 0, 1)  # one column whose weights' rounding shows
@given(
    st.integers(1, 90), st.integers(1, 20), st.integers(1, 20), st.sampled_from([16, 32, 48, 64, 96, 512]),
    st.integers(0, 511), st.booleans(), st.sampled_from(["int4", "int8"]),
    st.sampled_from([HALF, torch.float32]), st.booleans(), st.booleans(),
    st.integers(0, 31), st.integers(0, 10**6),
)  # fmt: skip
def test_any_weight(out, chunks, rows, group, offset, mins, fmt, scale_dtype, g_idx, x_perm, cut, seed):
    inn = 32 * chunks - (cut if fmt == "int8" else 0)
    options = {"offset": offset % group, "mins": mins, "scale_dtype": scale_dtype, "seed": seed}
    w = make(fmt, out, inn, group=group, g_idx=g_idx, x_perm=x_perm, **options)
    check(w, random(rows, inn, seed=seed, dtype=HALF))


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding_rows(kind):
    w = weight(kind, 37, 203)
    ids = torch.tensor([0, 36, 5, 5, 17])
    exact = reference_ops.matrix(w)
    assert_accurate(embedding(ids, grouped(w)), packed.dequantize(w, HALF)[ids], exact[ids])
    hostile = torch.tensor([-1, 37, 1 << 40, -(1 << 62)])
    near = torch.tensor([0, 36, 36, 0])
    assert torch.equal(embedding(hostile, grouped(w)), embedding(near, grouped(w)))
    assert embedding(ids[:0], grouped(w)).shape == (0, w.shape[1])
    if w.x_perm is not None:
        stored = dequantize(grouped(w), permute=False)
        assert torch.equal(stored, dequantize(grouped(w))[:, w.x_perm])


def test_dense_products():
    x, matrix = random(3, 40, seed=1, dtype=HALF), random(7, 40, seed=2, dtype=HALF)
    assert torch.equal(dense(x, matrix), (x.float() @ matrix.float().T).half())


def test_hostile_groups_and_permutations_stay_inside():
    w = make("int4", 40, 64, g_idx=True)
    w.g_idx[::3] = 1 << 30
    w.g_idx[1::3] = -5
    exact = w._replace(g_idx=w.g_idx.clamp(0, 1))
    x = random(2, 64, seed=1, dtype=HALF)
    assert torch.equal(linear(x, grouped(w)), linear(x, grouped(exact)))
    w = make("int4", 40, 64, x_perm=True)
    w.x_perm[3] = 1 << 30
    w.x_perm[4] = -7
    assert linear(x, grouped(w)).shape == (2, 40)
    assert dequantize(grouped(w)).shape == (40, 64)


BASE = grouped(make("int4", 8, 64))
BAD = {
    "codes: torch.uint8 (8, 16), expected torch.uint8 (8, 32)": BASE._replace(codes=BASE.codes[:, :16]),
    "codes: torch.int8": BASE._replace(codes=BASE.codes.view(torch.int8)),
    "scales: torch.float16 (4, 2), expected": BASE._replace(scales=BASE.scales[:4]),
    "scales: last stride 8, expected 1": BASE._replace(scales=BASE.scales.T.contiguous().T),
    "scales: 2 groups of 16 columns": BASE._replace(group_size=16),
    "scales: no groups, 64 columns need one": BASE._replace(
        scales=BASE.scales[:, :0], mins=None, g_idx=torch.zeros(64, dtype=torch.int32)
    ),
    "mins: torch.float32": BASE._replace(mins=BASE.mins.float()),
    "group_size, group_offset: 32, 32": BASE._replace(group_offset=32),
    "g_idx: torch.int64": BASE._replace(g_idx=torch.zeros(64, dtype=torch.int64)),
    "x_perm: torch.int64 (63,), expected": BASE._replace(x_perm=torch.arange(63)),
    "x_perm: stride 2, expected 1": BASE._replace(x_perm=torch.arange(128)[::2]),
    "bias: torch.float32 (7,)": BASE._replace(bias=torch.zeros(7)),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("rows", [1, 300])
def test_bad_fields_are_named(message, rows):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        linear(torch.ones(rows, 64, dtype=HALF), BAD[message])


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x: \(2, 63\), expected \(N, 64\)"):
        linear(torch.ones(2, 63, dtype=HALF), BASE)
    with pytest.raises(ValueError, match=r"x: torch.bfloat16, .*Volta has no bfloat16"):
        linear(torch.ones(2, 64).bfloat16(), BASE)
    with pytest.raises(ValueError, match=r"ids: torch.int32 \(1,\), expected int64"):
        embedding(torch.zeros(1, dtype=torch.int32), BASE)
