"""RMSNorm and SwiGLU of every backend and instruction set against float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from fastattn import reference_ops
from fastattn.spec import RmsNormArgs, SwigluArgs

from .runners import FLOATS, assert_accurate, random, run

SHAPES = [(1, 1), (3, 7), (2, 64), (5, 129), (4, 3, 33), (2, 9, 64), (7, 576), (2, 3, 2, 17), (5,), (0, 8)]
# The dtypes of x, of the weight and of the residual.
MIXES = [
    *((d, d, None) for d in FLOATS),
    *((d, torch.float32, d) for d in FLOATS),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
]


def name(value: object) -> str:
    return str(value).replace("torch.", "")


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "-".join(name(d) for d in m))
def test_rms_norm(ops, shape, mix):
    dtype, weight_dtype, residual_dtype = mix
    x = random(*shape, seed=1, dtype=dtype, scale=3)
    weight = random(shape[-1], seed=2, dtype=weight_dtype)
    residual = None if residual_dtype is None else random(*shape, seed=3, dtype=residual_dtype)
    args = RmsNormArgs(x, weight, 1e-5, residual)
    ours, total = run(ops, "rms_norm", args)
    exact, exact_total = reference_ops.rms_norm(args)
    assert ours.dtype == total.dtype == dtype
    assert torch.equal(total, exact_total)
    s = x if residual is None else exact_total
    plain = (s * torch.rsqrt(s.square().mean(-1, keepdim=True) + 1e-5)) * weight.to(dtype)
    assert_accurate(ours, plain, exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
def test_rms_norm_of_heads_inside_a_fused_projection(ops, dtype):
    fused = random(5, 4 * 48 + 30, seed=4, dtype=dtype)
    x = fused[:, 10 : 10 + 4 * 48].view(5, 4, 48)
    weight = random(48, seed=5, dtype=dtype)
    args = RmsNormArgs(x, weight, 1e-6)
    ours, total = run(ops, "rms_norm", args)
    assert total.numel() == 0
    assert ours.is_contiguous()
    plain, _ = run(ops, "rms_norm", args._replace(x=x.contiguous()))
    assert torch.equal(ours, plain)
    exact = reference_ops.rms_norm(args)[0]
    assert_accurate(ours, exact.to(dtype), exact)


def test_rms_norm_of_a_large_input_on_threads(ops):
    x, weight = random(200, 1030, seed=6), random(1030, seed=7)
    args = RmsNormArgs(x, weight, 1e-5, x.flip(0))
    ours, total = run(ops, "rms_norm", args)
    exact, exact_total = reference_ops.rms_norm(args)
    assert torch.equal(total, exact_total)
    assert_accurate(ours, F.rms_norm(total, (1030,), weight, 1e-5), exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize(
    "shape", [(1, 2), (3, 14), (2, 66), (4, 3072), (2, 3, 50), (0, 8), (300, 130)], ids=name
)
def test_swiglu(ops, dtype, shape):
    x = random(*shape, seed=8, dtype=dtype, scale=4)
    args = SwigluArgs(x)
    ours = run(ops, "swiglu", args)
    assert ours.dtype == dtype
    gate, up = x.chunk(2, -1)
    assert_accurate(ours, F.silu(gate) * up, reference_ops.swiglu(args))


def test_swiglu_of_strided_rows_and_extreme_gates(ops):
    gates = torch.tensor([-200.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 200.0, 3e38])
    x = torch.cat([gates, torch.ones(8)]).repeat(3, 2)[:, :16]
    ours = run(ops, "swiglu", SwigluArgs(x))
    exact = reference_ops.swiglu(SwigluArgs(x))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-37)


BAD_NORM = [
    ("weight", RmsNormArgs(torch.ones(2, 8), torch.ones(7), 1e-5)),
    ("residual", RmsNormArgs(torch.ones(2, 8), torch.ones(8), 1e-5, torch.ones(2, 7))),
    ("residual", RmsNormArgs(torch.ones(2, 8), torch.ones(8), 1e-5, torch.ones(3, 8))),
]


@pytest.mark.parametrize(("argument", "args"), BAD_NORM, ids=["weight", "width", "rows"])
def test_rms_norm_names_the_bad_argument(native_ops, argument, args):
    with pytest.raises(ValueError, match=f"^{argument}: shape .* expected"):
        run(native_ops, "rms_norm", args)


def test_an_odd_gate_is_refused(native_ops):
    with pytest.raises(ValueError, match="x: 7 columns, expected gate and up"):
        run(native_ops, "swiglu", SwigluArgs(torch.ones(2, 7)))


def test_what_the_kernels_cannot_take_is_a_reason(native_ops):
    for weight, residual in product((torch.float16, torch.bfloat16), (torch.float16, torch.bfloat16)):
        args = RmsNormArgs(
            torch.ones(2, 8), torch.ones(8, dtype=weight), 1e-5, torch.ones(2, 8, dtype=residual)
        )
        reasons = native_ops["rms_norm"].reasons(args.signature())
        assert len(reasons) == 2
        assert reasons[0].startswith("weight dtype")
    assert native_ops["swiglu"].reasons(SwigluArgs(torch.ones(2, 8).double()).signature())
