"""Quantized and dense linear of every backend and instruction set against float64."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fastattn import reference_ops
from fastattn.quant import packed
from fastattn.spec import LinearArgs, PackedWeight

from .runners import FLOATS, assert_accurate, random, run
from .weights import make

FORMATS = {
    "int4": {},
    "int4 g16": {"group": 16},
    "int4 g128 float32": {"group": 128, "scale_dtype": torch.float32},
    "int4 cut at 32": {"group": 64, "offset": 32},
    "int4 cut at 16": {"group": 64, "offset": 16},
    "int4 cut at 5": {"offset": 5},
    "int4 g_idx": {"g_idx": True},
    "int4 x_perm bias": {"x_perm": True, "bias": torch.float32},
    "int8": {},
    "int8 no mins": {"mins": False},
    "int8 g16 float32": {"group": 16, "scale_dtype": torch.float32, "mins": False},
    "int8 cut at 7 bias": {"group": 48, "offset": 7, "bias": torch.float16},
    "int8 g_idx x_perm": {"g_idx": True, "x_perm": True},
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
    for rows in (1, 5):
        check(ops, w, random(rows, w.shape[1], seed=rows))


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
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.parametrize("rows", [1, 70])
def test_the_kernel_names_the_bad_field(native_ops, match, rows):
    with pytest.raises(ValueError, match=f"^{match}"):
        run(native_ops, "linear", LinearArgs(torch.ones(rows, 64), BAD[match]))
