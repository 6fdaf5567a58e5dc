"""Linear on more rows than the kernel for few takes: every backend and instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import native, reference_ops
from fastattn.backends import cpu_ops
from fastattn.quant import packed
from fastattn.spec import LinearArgs

from .runners import FLOATS, assert_accurate, random, run
from .test_linear import DTYPES, FORMATS, check, weight
from .weights import make

# Around the vectors, register tiles and blocks of rows of x: 4, 8, 16 and 32 lanes; 512 are packed at a time.
ROWS = (64, 65, 79, 80, 84, 97, 512, 530)


@DTYPES
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(ops, kind, dtype):
    w = weight(kind, 61, 203)
    for rows in (70, 100):
        check(ops, w, random(rows, w.shape[1], seed=rows, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_x(ops, rows, dtype):
    w = weight("int4", 50, 96)
    check(ops, w, random(rows, 96, seed=rows, dtype=dtype))


@pytest.mark.parametrize("out", [1, 6, 11, 12, 13, 47, 48, 49, 96, 131])
def test_rows_of_the_weight(ops, out):
    for dtype in FLOATS:
        check(ops, weight("int4 x_perm bias", out, 64), random(66, 64, seed=out, dtype=dtype))


@pytest.mark.parametrize("inn", [1, 2, 31, 33, 255, 256, 257, 511, 513, 1100])
def test_columns_of_the_weight(ops, inn):
    for dtype in FLOATS:
        for kind in ("int8", "int8 cut at 7 bias", "float32", "bfloat16 x_perm bias"):
            check(ops, weight(kind, 20, inn), random(66, inn, seed=inn, dtype=dtype))


@pytest.mark.parametrize(("rows", "out", "inn"), [(70, 0, 32), (70, 5, 0), (70, 0, 0)])
def test_no_elements(ops, rows, out, inn):
    for dtype in FLOATS:
        for bias in (None, torch.float32):
            check(ops, make("float32", out, inn, bias=bias), random(rows, inn, seed=1, dtype=dtype))


def test_strided_input_and_a_cut_weight(ops):
    w = packed.slice_out(packed.slice_in(make("int4", 80, 256, bias=torch.float32), 64, 192), 3, 73)
    w = w._replace(bias=random(140, seed=2)[::2])
    for dtype in FLOATS:
        check(ops, w, random(75, 300, seed=1, dtype=dtype)[:, 100:228])
        check(ops, w, random(128, 75, seed=1, dtype=dtype).T)


@DTYPES
def test_threads_agree_to_the_last_bit(native_ops, dtype):
    w, x = make("int4", 500, 1024, seed=3), random(90, 1024, seed=4, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(native_ops, "linear", LinearArgs(x, w)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_row_does_not_depend_on_the_others(native_ops):
    """Infinities and NaN stay in their row of the result."""
    w, x = make("int4", 30, 64), random(70, 64, seed=1)
    expected = run(native_ops, "linear", LinearArgs(x, w))
    bad = x.clone()
    bad[3, 5], bad[40, 0], bad[69, 63] = torch.inf, torch.nan, -torch.inf
    y = run(native_ops, "linear", LinearArgs(bad, w))
    for row in range(70):
        if row in (3, 40, 69):
            assert not torch.isfinite(y[row]).any()
        else:
            assert torch.equal(y[row], expected[row])


@pytest.mark.parametrize(("dtype", "rows"), [(torch.bfloat16, 10), (torch.float32, 15)], ids=str)
def test_the_gemm_takes_over_where_integers_do_not_fit(native_ops, dtype, rows):
    """Of a g_idx, from fewer rows on than integers lose to it at: bit for bit its result."""
    bad = random(rows, 256, seed=rows, dtype=dtype)
    bad[2, 7] = torch.inf
    for kind, x in (("int4 g_idx runs", bad), ("int4 g_idx", bad.nan_to_num(1.0))):
        w = weight(kind, 40, 256)
        ours = run(native_ops, "linear", LinearArgs(x, w))
        by_gemm = cpu_ops.multiply(native.kernels.gemm, x, w)
        assert torch.equal(ours.nan_to_num(0.5), by_gemm.nan_to_num(0.5))


@settings(deadline=None, max_examples=60)
@given(
    isa=st.sampled_from(native.available_isas()),
    kind=st.sampled_from(["int4", "int8", "int8 no mins", "float32"]),
    dtype=st.sampled_from(FLOATS),
    rows=st.integers(1, 90),
    out=st.integers(1, 130),
    inn=st.integers(1, 700),
)
def test_any_shape_in_the_gemm_kernel(isa, kind, dtype, rows, out, inn):
    """The kernel itself, also on the few rows that linear gives to another."""
    before = native.isa()
    native.set_isa(isa)
    try:
        w = weight(kind, out, inn)
        x = random(rows, w.shape[1], seed=rows, dtype=dtype)
        ours = cpu_ops.multiply(native.kernels.gemm, x, w)
    finally:
        native.set_isa(before)
    work = torch.float32 if dtype == torch.float16 else dtype
    plain = F.linear(x.to(work), packed.dequantize(w, work)).to(dtype)
    assert_accurate(ours, plain, reference_ops.linear(LinearArgs(x, w)))
