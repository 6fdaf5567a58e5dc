"""Quantized and dense linear of every backend and instruction set against float64."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastattn import native, reference_ops
from fastattn.backends import cpu_ops, torch_ops
from fastattn.quant import packed
from fastattn.spec import LinearArgs, PackedWeight

from .runners import FLOATS, assert_accurate, random, run
from .weights import QUANTIZED, make

FORMATS = QUANTIZED | {
    "int4 g_idx runs": {"g_idx": "runs", "group": 64},
    "int8 g_idx runs": {"g_idx": "runs", "group": 48, "mins": False},
    "float32": {},
    "float16 bias": {"bias": torch.float16},
    "bfloat16 x_perm bias": {"x_perm": True, "bias": torch.bfloat16},
}
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
ROWS = (0, 1, 2, 3, 7, 8, 15, 65)


@cache
def weight(kind: str, out: int, inn: int) -> PackedWeight:
    fmt = kind.split(maxsplit=1)[0]
    return make(fmt, out, (inn + 31) // 32 * 32 if fmt == "int4" else inn, **FORMATS[kind])


def check(ops, w, x):
    """One product against float64, and against torch's own in the same dtype."""
    args = LinearArgs(x, w)
    ours = run(ops, "linear", args)
    assert ours.dtype == x.dtype
    exact = reference_ops.linear(args)
    # float16 through float32: torch's own float16 product on a CPU is no baseline.
    work = torch.float32 if x.dtype == torch.float16 else x.dtype
    bias = None if w.bias is None else w.bias.to(work)
    plain = F.linear(x.to(work), packed.dequantize(w, work), bias).to(x.dtype)
    assert_accurate(ours, plain, exact)


@DTYPES
@pytest.mark.parametrize("kind", FORMATS)
def test_linear(ops, kind, dtype):
    w = weight(kind, 37, 203)
    for rows in ROWS:
        check(ops, w, random(rows, w.shape[1], seed=rows, dtype=dtype))


@pytest.mark.parametrize("kind", ["int4", "int8", "bfloat16 x_perm bias"])
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (4, 96), (5, 1024), (130, 576)], ids=str)
def test_shapes_of_the_weight(ops, kind, shape):
    w = weight(kind, *shape)
    x = random(5, w.shape[1], seed=1)
    check(ops, w, x)
    # Row by row, the errors of all together: that of one small number is a matter of luck.
    rows = torch.cat([run(ops, "linear", LinearArgs(row, w)) for row in x.split(1)])
    args = LinearArgs(x, w)
    assert_accurate(rows, torch_ops.linear(args), reference_ops.linear(args))


@pytest.mark.parametrize("inn", [1, 15, 31, 33, 64, 65])
def test_widths_that_are_no_whole_chunk(ops, inn):
    for kind in ("int8", "int8 g16 float32", "float32", "float16 bias"):
        w = weight(kind, 6, inn)
        for rows in (1, 4):
            check(ops, w, random(rows, inn, seed=rows))


@DTYPES
def test_a_large_weight_on_threads_and_in_tiles(ops, dtype):
    w = make("int4", 3000, 704, bias=torch.float32, seed=3)
    args = LinearArgs(random(1, 704, seed=1, dtype=dtype), w)
    matrix = packed.dequantize(w, torch.float64)
    for rows in (1, 9, 70):
        x = random(rows, 704, seed=rows, dtype=dtype)
        ours = run(ops, "linear", args._replace(x=x))
        exact = x.double() @ matrix.T + w.bias.double()
        work = torch.float32 if dtype == torch.float16 else dtype
        plain = F.linear(x.to(work), matrix.to(work), w.bias.to(work)).to(dtype)
        assert_accurate(ours, plain, exact)


def test_float16_never_passes_through_bfloat16(ops):
    # 1 + 2^-10 is a float16 and no bfloat16.
    x = torch.full((1, 32), 1 + 2.0**-10, dtype=torch.float16)
    for rows in (1, 70):
        w = packed.dense(torch.eye(32, dtype=torch.float16) * (1 + 2.0**-9))
        y = run(ops, "linear", LinearArgs(x.repeat(rows, 1), w))
        exact = torch.tensor((1 + 2.0**-10) * (1 + 2.0**-9), dtype=torch.float64).to(torch.float16)
        assert (y == exact).all()


def test_pieces_of_a_matrix_sum_to_the_whole(ops):
    w = make("int4", 24, 256, group=64)
    x = random(3, 256, seed=5)
    whole = reference_ops.linear(LinearArgs(x, w))
    cuts = [0, 32, 83, 160, 249, 256]
    total = torch.zeros(3, 24, dtype=torch.float64)
    for lo, hi in pairwise(cuts):
        piece = packed.slice_in(w, lo, hi)
        total += run(ops, "linear", LinearArgs(x[:, lo:hi], piece)).double()
    assert float((total - whole).abs().max()) <= 1e-5 * float(whole.abs().max())


def test_strided_input_and_a_cut_weight(ops):
    w = packed.slice_out(packed.slice_in(make("int4", 40, 256, bias=torch.float32), 64, 192), 3, 33)
    w = w._replace(bias=random(60, seed=2)[::2])
    check(ops, w, random(5, 300, seed=1)[:, 100:228])
    check(ops, w, random(128, 5, seed=1).T)


INTEGERS = [
    "int4", "int4 g128 float32", "int4 cut at 32", "int4 cut at 5", "int4 g_idx runs",
    "int8", "int8 no mins", "int8 g16 float32", "int8 g_idx runs",
]  # fmt: skip


@DTYPES
@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("rows", range(1, 18))
def test_every_number_of_rows(ops, kind, dtype, rows):
    w = weight(kind, 21, 320)
    check(ops, w, random(rows, w.shape[1], seed=rows, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("kind", INTEGERS)
def test_outliers_do_not_drown_the_rest(ops, kind, dtype):
    w = weight(kind, 37, 203)
    for rows in (1, 6):
        x = random(rows, w.shape[1], seed=rows)
        x[:, ::41] *= 1000
        check(ops, w, x.to(dtype))


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-37, 1e-20, 1e20, 1e32, 1e34, 1e36])
def test_magnitudes(ops, kind, scale):
    w = weight(kind, 37, 203)
    for rows in (1, 6):
        check(ops, w, random(rows, w.shape[1], seed=rows, scale=scale))
        x = random(rows, w.shape[1], seed=rows)
        x[:, 60:] *= scale
        check(ops, w, x)


@DTYPES
@pytest.mark.parametrize("kind", [*INTEGERS, "int8 cut at 7 bias"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(ops, kind, dtype, value):
    w = weight(kind, 37, 203)
    for act in ("", "int8"):
        for column in (0, 100, w.shape[1] - 1):
            x = random(3, w.shape[1], seed=column, dtype=dtype)
            x[1, column] = value
            y = run(ops, "linear", LinearArgs(x, w, act=act))
            assert not torch.isfinite(y[1]).any()
            assert torch.isfinite(y[[0, 2]]).all()


def assert_rounded(ours, x, w):
    """As far off as roundings of each 32 columns to 1/254 of their largest value explain; how far."""
    exact = reference_ops.linear(LinearArgs(x, w))
    chunks = F.pad(x.double(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    step = chunks.abs().amax(2).repeat_interleave(32, 1)[:, : x.shape[1]] / 254
    matrix = packed.dequantize(w, torch.float64)
    bound = (step @ matrix.abs().T) * 1.01 + torch.finfo(ours.dtype).eps * exact.abs().max()
    rounded = ours.double() - exact
    assert (rounded.abs() <= bound).all()
    return rounded


@DTYPES
@pytest.mark.parametrize("kind", INTEGERS)
def test_activations_in_8_bits(native_ops, kind, dtype):
    """As far off as roundings of each 32 columns to 1/254 of their largest value explain, and no more."""
    w = weight(kind, 64, 320)
    for rows in (1, 5):
        x = random(rows, w.shape[1], seed=rows, dtype=dtype)
        x[:, 50] *= 100
        exact = reference_ops.linear(LinearArgs(x, w))
        rounded = assert_rounded(run(native_ops, "linear", LinearArgs(x, w, act="int8")), x, w)
        full = run(native_ops, "linear", LinearArgs(x, w)).double() - exact
        if dtype == torch.float32:
            assert 100 * full.norm() < rounded.norm()


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 15), st.sampled_from([16, 32, 48, 64, 96, 512]),
    st.integers(0, 511), st.sampled_from(["aligned", "any", "runs"]), st.booleans(),
    st.sampled_from(["int4", "int8"]), st.sampled_from(FLOATS),
    st.sampled_from([torch.float16, torch.float32]), st.integers(0, 31), st.integers(0, 10**6),
)  # fmt: skip
def test_any_weight(out, chunks, rows, group, offset, groups, mins, fmt, dtype, scale_dtype, cut, seed):
    """Within what rounding x to integers of 15 or 23 bits and sums in float32 may lose, whatever cancels."""
    inn = 32 * chunks - (cut if fmt == "int8" else 0)
    options = {"mins": mins, "scale_dtype": scale_dtype, "seed": seed}
    if groups == "runs":
        options["g_idx"] = groups
    else:
        options["offset"] = offset % group // 16 * 16 if groups == "aligned" else offset % group
    w = make(fmt, out, inn, group=group, **options)
    x = random(rows, inn, seed=seed, dtype=dtype)
    exact = reference_ops.linear(LinearArgs(x, w))
    scales = w.tensors["scales"].double()[:, packed.column_groups(w).long()]
    size = packed.dequantize(w, torch.float64).abs() + 16 * scales
    largest = x.double().abs().amax(1, keepdim=True).expand_as(x)
    integers = largest * 2.0 ** (-22 if dtype == torch.float32 else -14)
    limit = (integers + x.double().abs() * 2.0**-21) @ size.T + torch.finfo(dtype).eps * exact.abs()
    before = native.isa()
    try:
        for isa in native.available_isas():
            native.set_isa(isa)
            ours = cpu_ops.multiply(native.kernels.linear, x, w)  # never the GEMM, which may round W
            assert ((ours.double() - exact).abs() <= limit).all()
    finally:
        native.set_isa(before)


BASE = make("int4", 8, 64)
BAD = {
    "codes: shape": BASE._replace(tensors={**BASE.tensors, "codes": BASE.tensors["codes"][:, :16]}),
    "scales: shape": BASE._replace(tensors={**BASE.tensors, "scales": BASE.tensors["scales"][:4]}),
    "scales: last stride": BASE._replace(
        tensors={**BASE.tensors, "scales": BASE.tensors["scales"].T.contiguous().T}
    ),
    "mins: shape": BASE._replace(tensors={**BASE.tensors, "mins": BASE.tensors["mins"][:, :1]}),
    "mins: missing": BASE._replace(tensors={k: v for k, v in BASE.tensors.items() if k != "mins"}),
    "g_idx: value 2": BASE._replace(g_idx=torch.full((64,), 2, dtype=torch.int32)),
    "group_size: 20": BASE._replace(group_size=20),
    "group_offset: 32": BASE._replace(group_offset=32),
    "bias: shape": BASE._replace(bias=torch.zeros(7)),
    "format: 'int3'": BASE._replace(format="int3"),
    "scales: missing": BASE._replace(tensors={n: t for n, t in BASE.tensors.items() if n != "scales"}),
    "names: 'zeros'": BASE._replace(tensors=BASE.tensors | {"zeros": BASE.tensors["scales"]}),
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.parametrize("rows", [1, 70])
def test_the_kernel_names_the_bad_field(native_ops, match, rows):
    with pytest.raises(ValueError, match=f"^{match}"):
        run(native_ops, "linear", LinearArgs(torch.ones(rows, 64), BAD[match]))


def test_an_order_of_columns_may_be_strided(native_ops):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    strided = torch.stack((order, order), 1)[:, 0]
    x = torch.randn(3, 64)
    expected = run(native_ops, "linear", LinearArgs(x, BASE._replace(x_perm=order)))
    assert torch.equal(run(native_ops, "linear", LinearArgs(x, BASE._replace(x_perm=strided))), expected)
