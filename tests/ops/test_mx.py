"""MX packing: bit for bit what the specification says, for every backend and instruction set."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn import reference_mx
from fastattn.backends import cpu_mx, torch_mx
from fastattn.quant import mx
from fastattn.spec import MxPackArgs, MxUnpackArgs

from .runners import FLOATS, random, run

ELEMENTS = pytest.mark.parametrize("element", mx.ELEMENTS)
SCALES = pytest.mark.parametrize("scale", mx.SCALES)
SEARCH = pytest.mark.parametrize("search", [False, True], ids=["rule", "search"])
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
def expected(args: tuple[str, str, str, int, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    kind, element, scale, block, search = args
    return reference_mx.mx_pack(MxPackArgs(patterns(kind), element, block, scale, search))


@ELEMENTS
@SCALES
@SEARCH
@pytest.mark.parametrize(
    ("kind", "block"),
    [("each its own block", 1), ("shuffled", 32), ("neighbours", 16), ("with NaN", 8)],
    ids=["single", "shuffled", "neighbours", "nan"],
)
def test_every_bfloat16_is_packed_as_specified(ops, element, scale, search, kind, block):
    args = MxPackArgs(patterns(kind), element, block, scale, search)
    codes, scales = run(ops, "mx_pack", args)
    exact_codes, exact_scales = expected((kind, element, scale, block, search))
    assert torch.equal(scales, exact_scales)
    assert torch.equal(codes, exact_codes)


def packed(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (..., n) as a little-endian bit stream, (..., n * bits / 8) bytes."""
    stream = numbers[..., None] >> torch.arange(bits) & 1
    return (stream.flatten(-2).unflatten(-1, (-1, 8)) << torch.arange(8)).sum(-1).to(torch.uint8)


@ELEMENTS
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize("scale", ["floor", "e4m3", "fp16"])
def test_every_code_and_scale_is_unpacked_as_specified(ops, element, dtype, scale):
    bits = mx.element(element).bits
    codes = packed(torch.arange(1 << bits), bits).expand(256, -1)
    blocks = (1 << bits) // 4
    if scale == "floor":
        scales = torch.arange(256)[:, None].repeat(1, blocks)
    else:  # every byte as the row's, and as the low or high byte of a block's
        scales = torch.randint(256, (256, mx.scale_bytes(1 << bits, 4, scale)))
        scales[:, :2] = torch.stack((torch.randperm(256), torch.arange(256)), 1)
        scales[128:, :2] = torch.stack((torch.arange(128), torch.arange(100, 228)), 1)
    args = MxUnpackArgs(codes, scales.to(torch.uint8), element, 4, 1 << bits, dtype, scale)
    ours, exact = run(ops, "mx_unpack", args), reference_mx.mx_unpack(args)
    assert ours.dtype == dtype
    assert torch.equal(ours.isnan(), exact.isnan())
    # Through float32, which holds every finite value but 2^128 and more, and less than 2^-149.
    wanted = exact.float().to(dtype)
    assert torch.equal(ours.nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))


@ELEMENTS
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize(("shape", "block"), SHAPES, ids=str)
def test_tails_and_shapes(ops, element, dtype, shape, block):
    x = random(*shape, seed=2, dtype=dtype, scale=3)
    args = MxPackArgs(x, element, block, "floor")
    codes, scales = run(ops, "mx_pack", args)
    exact_codes, exact_scales = reference_mx.mx_pack(args)
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
@SEARCH
def test_subnormal_blocks_and_many_rows(ops, scale, search):
    x = random(400, 33, seed=3) * 1e-39
    x[:, 5] = 2.0**-149
    for element in mx.ELEMENTS:
        args = MxPackArgs(x, element, 32, scale, search)
        codes, scales = run(ops, "mx_pack", args)
        exact_codes, exact_scales = reference_mx.mx_pack(args)
        assert torch.equal(scales, exact_scales)
        assert torch.equal(codes, exact_codes)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=70),
    st.sampled_from(list(mx.ELEMENTS)),
    st.sampled_from(mx.SCALES),
    st.integers(1, 40),
    st.booleans(),
)
def test_any_floats_at_all(values, element, scale, block, search):
    args = MxPackArgs(torch.tensor(values), element, block, scale, search)
    exact = reference_mx.mx_pack(args)
    for backend in (torch_mx, cpu_mx):
        for ours, wanted in zip(backend.mx_pack(args), exact, strict=True):
            assert torch.equal(ours, wanted)
    unpack = MxUnpackArgs(*exact, element, block, len(values), torch.float32, scale)
    wanted = reference_mx.mx_unpack(unpack).float()
    for backend in (torch_mx, cpu_mx):
        assert torch.equal(backend.mx_unpack(unpack).nan_to_num(nan=0.0), wanted.nan_to_num(nan=0.0))


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


@pytest.mark.parametrize("scale", ["floor", "e4m3", "fp16"])
@pytest.mark.parametrize("element", ["e1m1", "int4", "e2m1", "e2m3"])
def test_search_lowers_the_squared_error(ops, element, scale):
    x = random(64, 96, seed=5).square() * random(64, 96, seed=6)  # a few large values, many small ones

    def error(search):
        codes, scales = run(ops, "mx_pack", MxPackArgs(x, element, 32, scale, search))
        args = MxUnpackArgs(codes, scales, element, 32, 96, torch.float32, scale)
        return (run(ops, "mx_unpack", args).double() - x.double()).square().unflatten(1, (3, 32)).sum(-1)

    plain, searched = error(False), error(True)
    assert float(searched.sum()) < float(plain.sum())
    # A block gets worse at most by what rounding the errors to units hides.
    assert (searched <= 1.2 * plain + 1e-6).all()


@pytest.mark.parametrize("scale", ["e4m3", "fp16"])
def test_finer_scales_put_the_largest_value_onto_the_largest_element(ops, scale):
    x = random(32, 64, seed=7)
    x[:, ::32] = 8 * x.abs().amax(1, keepdim=True) * torch.tensor([1.0, -0.3])
    codes, scales = run(ops, "mx_pack", MxPackArgs(x, "e2m1", 32, scale))
    back = run(ops, "mx_unpack", MxUnpackArgs(codes, scales, "e2m1", 32, 64, torch.float32, scale))
    precision = {"e4m3": 2**-4, "fp16": 2**-11}[scale]
    assert ((back / x)[:, ::32] - 1).abs().max() <= precision
    assert ((back / x)[:, ::32] - 1).abs().max() > precision / 100


def test_int4_and_e1m1_are_symmetric(ops):
    x = torch.tensor([[1.75, -1.75, -2.0, 2.0, 0.124, 0.125, 0.126, 0.375]])
    codes, scales = run(ops, "mx_pack", MxPackArgs(x, "int4", 8, "ceil"))
    assert scales.tolist() == [[128]]  # 2.0 needs the next power of two
    codes, scales = run(ops, "mx_pack", MxPackArgs(x, "int4", 8, "floor"))
    assert scales.tolist() == [[128]]
    codes, scales = run(ops, "mx_pack", MxPackArgs(x.clamp(-1.99, 1.99), "int4", 8, "floor"))
    assert scales.tolist() == [[127]]
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten().tolist()
    assert nibbles == [7, 9, 9, 7, 0, 0, 1, 2]  # saturated at -7; ties 0.125 -> 0, 0.375 -> 2 quarters
    codes, _ = run(ops, "mx_pack", MxPackArgs(torch.tensor([[3.0, -3.0, 0.5, 1.5, 2.5, -1.0]]), "e1m1", 8))
    numbers = [int(codes[0, :3].tolist()[i // 8] >> i % 8 & 1) for i in range(18)]
    assert [sum(numbers[3 * i + b] << b for b in range(3)) for i in range(6)] == [3, 7, 0, 2, 2, 5]


def test_sizes():
    sizes = {e: mx.code_bytes(33, e) for e in mx.ELEMENTS}
    assert sizes == {
        "e1m1": 13, "e2m1": 17, "e2m2": 21, "e2m3": 25, "e3m2": 25, "e4m3": 33, "e5m2": 33, "int4": 17,
        "int8": 33,
    }  # fmt: skip
    assert [mx.scale_bytes(n, 32) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert [mx.scale_bytes(n, 32, "e4m3") for n in (0, 1, 32, 33)] == [1, 2, 2, 3]
    assert [mx.scale_bytes(n, 32, "fp16") for n in (0, 1, 32, 33)] == [1, 3, 3, 5]
    assert {e: mx.element(e).max_value for e in mx.ELEMENTS} == {
        "e1m1": 3.0, "e2m1": 6.0, "e2m2": 7.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3": 448.0, "e5m2": 57344.0,
        "int4": 7 / 4, "int8": 127 / 64,
    }  # fmt: skip


ONE = torch.ones(2, 32)
BAD = [
    ("element: 'e1m2'", "mx_pack", MxPackArgs(ONE, "e1m2", 32)),
    ("scale: 'round'", "mx_pack", MxPackArgs(ONE, "e2m1", 32, "round")),
    ("block: 0", "mx_pack", MxPackArgs(ONE, "e2m1", 0)),
    ("block: 1025", "mx_pack", MxPackArgs(ONE, "e2m1", 1025, "floor", True)),
    ("x: torch.float64", "mx_pack", MxPackArgs(ONE.double(), "e2m1", 32)),
    ("x: a scalar", "mx_pack", MxPackArgs(torch.tensor(1.0), "e2m1", 32)),
    ("codes: torch.uint8", "mx_unpack", MxUnpackArgs(ONE.byte(), ONE.byte(), "e2m1", 32, 32, torch.float32)),
    ("dtype: torch.int8", "mx_unpack", MxUnpackArgs(ONE.byte(), ONE.byte(), "e4m3", 32, 32, torch.int8)),
]


@pytest.mark.parametrize(("match", "name", "args"), BAD, ids=[m for m, _, _ in BAD])
def test_bad_input_is_named(ops, match, name, args):
    with pytest.raises(ValueError, match=f"^{match}"):
        ops[name].run(args)
