"""MX packing: bit for bit what the specification says, for every backend and instruction set."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn import reference_ops
from fastattn.backends import torch_ops
from fastattn.quant import mx
from fastattn.spec import MxPackArgs, MxUnpackArgs

from .runners import FLOATS, random, run

ELEMENTS = pytest.mark.parametrize("element", mx.ELEMENTS)
SCALES = pytest.mark.parametrize("scale", mx.SCALES)
SHAPES = [
    ((1,), 32),
    ((7, 33), 32),
    ((2, 3, 45), 8),
    ((4, 64), 16),
    ((0, 5), 32),
    ((3, 0), 32),
    ((2, 130), 7),
]


@cache
def patterns(kind: str) -> torch.Tensor:
    """Every bfloat16, arranged into blocks in several ways."""
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.bfloat16)
    finite = every[torch.isfinite(every)]
    if kind == "each its own block":
        return finite.reshape(-1, 1)
    if kind == "shuffled":
        order = torch.randperm(finite.numel(), generator=torch.Generator().manual_seed(1))
        return finite[order].reshape(60, -1)
    if kind == "neighbours":  # a block spans an eighth of a binade, around every tie of its element
        return finite.reshape(255, -1)
    return every.reshape(256, -1)  # with NaN and infinities


@cache
def expected(kind: str, element: str, scale: str, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_ops.mx_pack(MxPackArgs(patterns(kind), element, block, scale))


@ELEMENTS
@SCALES
@pytest.mark.parametrize(
    ("kind", "block"),
    [("each its own block", 1), ("shuffled", 32), ("neighbours", 16), ("with NaN", 8)],
    ids=["single", "shuffled", "neighbours", "nan"],
)
def test_every_bfloat16_is_packed_as_specified(ops, element, scale, kind, block):
    args = MxPackArgs(patterns(kind), element, block, scale)
    codes, scales = run(ops, "mx_pack", args)
    exact_codes, exact_scales = expected(kind, element, scale, block)
    assert torch.equal(scales, exact_scales)
    assert torch.equal(codes, exact_codes)


@ELEMENTS
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
def test_every_code_and_scale_is_unpacked_as_specified(ops, element, dtype):
    bits = mx.element(element).bits
    per_row = (1 << bits) * bits // 8
    if bits == 6:  # all 64 codes in order, packed by hand
        stream = torch.arange(64)[:, None] >> torch.arange(6) & 1
        row = (stream.reshape(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)
    elif bits == 4:
        row = torch.arange(0, 16, 2) | (torch.arange(1, 16, 2) << 4)
    else:
        row = torch.arange(256)
    codes = row.to(torch.uint8).expand(256, per_row)
    scales = torch.arange(256).to(torch.uint8)[:, None].repeat(1, (1 << bits) // 4)
    args = MxUnpackArgs(codes, scales, element, 4, 1 << bits, dtype)
    ours, exact = run(ops, "mx_unpack", args), reference_ops.mx_unpack(args)
    assert ours.dtype == dtype
    assert torch.equal(ours.isnan(), exact.isnan())
    # Through float32, which holds every finite value but 2^128 and more.
    wanted = exact.float().to(dtype)
    assert torch.equal(ours.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))


@ELEMENTS
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_tails_and_shapes(ops, element, dtype, shape, block):
    x = random(*shape, seed=2, dtype=dtype, scale=3)
    args = MxPackArgs(x, element, block, "floor")
    codes, scales = run(ops, "mx_pack", args)
    exact_codes, exact_scales = reference_ops.mx_pack(args)
    assert codes.shape == (*shape[:-1], mx.code_bytes(shape[-1], element))
    assert torch.equal(codes, exact_codes)
    assert torch.equal(scales, exact_scales)
    back = run(ops, "mx_unpack", MxUnpackArgs(codes, scales, element, block, shape[-1], dtype))
    assert back.shape == x.shape
    if x.numel():
        e = mx.element(element)
        step = 2.0**-e.mantissa_bits * 2  # of a block's largest binade; saturation loses less than one
        assert float((back.double() - x.double()).abs().max()) <= step * float(x.abs().max())


@SCALES
def test_subnormal_blocks_and_many_rows(ops, scale):
    x = random(400, 33, seed=3) * 1e-39
    x[:, 5] = 2.0**-149
    for element in mx.ELEMENTS:
        args = MxPackArgs(x, element, 32, scale)
        codes, scales = run(ops, "mx_pack", args)
        exact_codes, exact_scales = reference_ops.mx_pack(args)
        assert torch.equal(scales, exact_scales)
        assert torch.equal(codes, exact_codes)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=70),
    st.sampled_from(list(mx.ELEMENTS)),
    st.sampled_from(mx.SCALES),
    st.integers(1, 40),
)
def test_any_floats_at_all(values, element, scale, block):
    args = MxPackArgs(torch.tensor(values), element, block, scale)
    for ours, exact in zip(torch_ops.mx_pack(args), reference_ops.mx_pack(args), strict=True):
        assert torch.equal(ours, exact)


def test_values_that_the_format_holds_survive(ops):
    for element in mx.ELEMENTS:
        values = mx.decode_table(element)
        x = values[torch.isfinite(values) & (values.abs() <= mx.element(element).max_value)] * 2.0**-20
        args = MxPackArgs(x, element, x.numel(), "floor")
        codes, scales = run(ops, "mx_pack", args)
        back = run(
            ops, "mx_unpack", MxUnpackArgs(codes, scales, element, x.numel(), x.numel(), torch.float32)
        )
        assert torch.equal(back, x)


@pytest.mark.parametrize("scale", ["even", "ceil"])
def test_ceil_never_saturates_and_even_rarely(ops, scale):
    x = random(64, 32, seed=4)
    for element in ("e2m1", "e4m3", "int8"):
        _, floor = run(ops, "mx_pack", MxPackArgs(x, element, 32, "floor"))
        _, scales = run(ops, "mx_pack", MxPackArgs(x, element, 32, scale))
        assert ((scales - floor) <= 1).all()
        assert (scales > floor).any() or element != "e2m1"
        if scale == "ceil":
            largest = mx.element(element).max_value * torch.exp2(scales.double() - 127)
            assert (x.abs().amax(1, keepdim=True).double() <= largest).all()


def test_sizes():
    assert [mx.code_bytes(33, e) for e in mx.ELEMENTS] == [17, 25, 25, 33, 33, 33]
    assert [mx.scale_bytes(n, 32) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert {e: mx.element(e).max_value for e in mx.ELEMENTS} == {
        "e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3": 448.0, "e5m2": 57344.0, "int8": 127 / 64,
    }  # fmt: skip


ONE = torch.ones(2, 32)
BAD = [
    ("element: 'e1m2'", "mx_pack", MxPackArgs(ONE, "e1m2", 32)),
    ("scale: 'round'", "mx_pack", MxPackArgs(ONE, "e2m1", 32, "round")),
    ("block: 0", "mx_pack", MxPackArgs(ONE, "e2m1", 0)),
    ("x: torch.float64", "mx_pack", MxPackArgs(ONE.double(), "e2m1", 32)),
    ("x: a scalar", "mx_pack", MxPackArgs(torch.tensor(1.0), "e2m1", 32)),
    ("codes: torch.uint8", "mx_unpack", MxUnpackArgs(ONE.byte(), ONE.byte(), "e2m1", 32, 32, torch.float32)),
    ("dtype: torch.int8", "mx_unpack", MxUnpackArgs(ONE.byte(), ONE.byte(), "e4m3", 32, 32, torch.int8)),
]


@pytest.mark.parametrize(("match", "name", "args"), BAD, ids=[m for m, _, _ in BAD])
def test_bad_input_is_named(ops, match, name, args):
    with pytest.raises(ValueError, match=f"^{match}"):
        ops[name].run(args)
