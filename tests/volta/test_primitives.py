"""Shuffles, votes and mma.m8n8k4 against the PTX ISA, read in numpy; scalar operations against numpy's.

In the emulator, and where there is a GPU on that: the two halves of the primitives must agree.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_volta import runtime

from .planted import ArithmeticParams, MmaParams, Params, variant

words = st.lists(st.integers(0, 2**32 - 1), min_size=64, max_size=64)


def as_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, np.uint32).view(np.int32)).to(device)


def run_lanes(
    device: torch.device, plant: int, values: np.ndarray, table: np.ndarray, argument: int = 0
) -> np.ndarray:
    inputs, lanes = as_tensor(values, device), as_tensor(table, device)
    out = torch.zeros_like(inputs)
    params = Params(out.data_ptr(), inputs.data_ptr(), lanes.data_ptr(), plant, argument)
    runtime.load(variant("lanes", 64), device).launch((1, 1, 1), params, reads=(inputs, lanes), writes=(out,))
    return out.cpu().numpy().view(np.uint32)


@pytest.mark.parametrize("mask", range(32))
def test_shuffle_xor(mask: int, device: torch.device) -> None:
    values = np.arange(64, dtype=np.uint32) * 7
    got = run_lanes(device, 0, values, np.zeros(32, np.uint32), mask)
    assert (got == values.reshape(2, 32)[:, np.arange(32) ^ mask].ravel()).all()


@settings(max_examples=20)
@given(values=words, sources=st.lists(st.integers(0, 63), min_size=32, max_size=32))
def test_shuffle_takes_any_lane_and_any_bits(
    values: list[int], sources: list[int], device: torch.device
) -> None:
    """Floats that are NaNs with a payload pass unchanged; the source lane is taken modulo 32."""
    array, table = np.array(values, np.uint32), np.array(sources, np.uint32)
    expected = array.reshape(2, 32)[:, table % 32].ravel()
    assert (run_lanes(device, 1, array, table) == expected).all()


def test_a_vote_is_for_its_warp(device: torch.device) -> None:
    table = np.full(32, 1000, np.uint32)
    values = np.arange(64, dtype=np.uint32)
    assert not run_lanes(device, 2, values, table).any()
    values[40] = 1000
    assert run_lanes(device, 2, values, table).tolist() == [0] * 32 + [1] * 32


def fragment(operand: str, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element ``i`` of a lane: PTX ISA, "Matrix Fragments for mma.m8n8k4"."""
    upper = lane >= 16
    if operand == "A row":
        return (lane % 4 + (4 if upper else 0), i)
    if operand == "B col":
        return (i, lane % 4 + (4 if upper else 0))
    if operand == "B row":
        return (lane % 4, i + (4 if upper else 0))
    x = (lane & 0b1) + (i & 0b10)
    return (x + (4 if upper else 0), (i & 0b100) + (lane & 0b10) + (i & 0b1))


def quadpair(lane: int) -> int:
    return lane % 16 // 4


def run_mma(
    device: torch.device, a: np.ndarray, b: np.ndarray, d: np.ndarray, layout: str, repeat: int = 1
) -> np.ndarray:
    """``repeat`` times d += a b for four quadpairs: a [4, 8, 4], b [4, 4, 8] halves, d [4, 8, 8] floats."""
    fa, fb, fd = np.zeros((32, 4), np.float16), np.zeros((32, 4), np.float16), np.zeros((32, 8), np.float32)
    for lane in range(32):
        q = quadpair(lane)
        fa[lane] = [a[q][fragment("A row", lane, i)] for i in range(4)]
        fb[lane] = [b[q][fragment(f"B {layout}", lane, i)] for i in range(4)]
        fd[lane] = [d[q][fragment("C", lane, i)] for i in range(8)]
    ta, tb, td = (torch.from_numpy(x).to(device) for x in (fa, fb, fd))
    params = MmaParams(td.data_ptr(), ta.data_ptr(), tb.data_ptr(), layout == "row", repeat)
    runtime.load(variant("one_mma", 32), device).launch((1, 1, 1), params, reads=(ta, tb), writes=(td,))
    result, fd = np.zeros((4, 8, 8), np.float32), td.cpu().numpy()
    for lane in range(32):
        for i in range(8):
            result[quadpair(lane)][fragment("C", lane, i)] = fd[lane, i]
    return result


@pytest.mark.parametrize("layout", ["row", "col"])
def test_mma_of_small_integers_is_exact(layout: str, device: torch.device) -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(-8, 9, (4, 8, 4)), generator.integers(-8, 9, (4, 4, 8))
    d = generator.integers(-1000, 1000, (4, 8, 8))
    assert (run_mma(device, a, b, d, layout) == d + a @ b).all()
    assert (run_mma(device, a, b, d, layout, repeat=3) == d + 3 * (a @ b)).all()


def truncated_sum(terms: list[Fraction]) -> Fraction:
    """Fasi et al. (2021), V100: aligned to the largest exponent, 24 bits kept, the sum rounded to zero."""
    most = max(abs(term) for term in terms)
    if not most:
        return Fraction(0)

    def quantum(x: Fraction) -> Fraction:
        exponent = x.numerator.bit_length() - x.denominator.bit_length()
        exponent -= Fraction(2) ** exponent > x
        return Fraction(2) ** (exponent - 23)

    def truncate(x: Fraction, unit: Fraction) -> Fraction:
        return (abs(x) // unit) * unit * (1 if x >= 0 else -1)

    total = sum((truncate(term, quantum(most)) for term in terms), Fraction(0))
    return truncate(total, max(quantum(abs(total)), quantum(most))) if total else total


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), layout=st.sampled_from(["row", "col"]), spread=st.integers(0, 12))
def test_mma_rounds_as_the_v100(seed: int, layout: str, spread: int, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() not in ((7, 0), (7, 2)):
        pytest.skip("only Volta's tensor cores sum in this way")
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape) * 2.0 ** generator.integers(-spread, spread + 1, shape)

    a, b = draw(4, 8, 4).astype(np.float16), draw(4, 4, 8).astype(np.float16)
    d = draw(4, 8, 8).astype(np.float32)
    got = run_mma(device, a, b, d, layout)
    for q, r, c in np.ndindex(4, 8, 8):
        terms = [Fraction(float(d[q, r, c]))]
        terms += [Fraction(float(a[q, r, k])) * Fraction(float(b[q, k, c])) for k in range(4)]
        assert Fraction(float(got[q, r, c])) == truncated_sum(terms)


@pytest.mark.parametrize("layout", ["row", "col"])
def test_mma_of_infinities_and_nans(layout: str, device: torch.device) -> None:
    a, b = np.ones((4, 8, 4), np.float16), np.ones((4, 4, 8), np.float16)
    d = np.zeros((4, 8, 8), np.float32)
    a[0, 2, 1], b[1, 3, 5], d[2, 6, 6] = np.inf, np.nan, -np.inf
    a[3, 0, 0], d[3, 0, 1] = np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        expected = d + a.astype(np.float32) @ b.astype(np.float32)
    np.testing.assert_array_equal(run_mma(device, a, b, d, layout), expected)


OPERATIONS = (
    "exp2", "log2", "rcp", "rsqrt", "to_half", "low_half", "pack_half2", "byte_permute",
    "lop3", "multiply_add_up",
)  # fmt: skip


def run_arithmetic(device: torch.device, *arrays: np.ndarray) -> dict[str, np.ndarray]:
    """The words of every operation on a, b and c, in as many threads, a multiple of 32."""
    inputs = [as_tensor(x, device) for x in arrays]
    out = inputs[0].new_zeros(len(arrays[0]), len(OPERATIONS))
    params = ArithmeticParams(out.data_ptr(), *(x.data_ptr() for x in inputs))
    runtime.load(variant("arithmetic", 32), device).launch(
        (len(out) // 32, 1, 1), params, reads=inputs, writes=(out,)
    )
    return dict(zip(OPERATIONS, out.cpu().numpy().view(np.uint32).T, strict=True))


def rounded_up(a: float, b: float, c: float) -> np.float32:
    """The least float that is not below a b + c."""
    if not np.isfinite([a, b, c]).all():
        return np.float32(a * b + c)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    limit = Fraction(float(np.finfo(np.float32).max))
    if exact > limit:
        return np.float32(np.inf)
    near = np.float32(float(max(exact, -limit)))
    if Fraction(float(near)) < exact:
        return np.nextafter(near, np.float32(np.inf))
    below = np.nextafter(near, np.float32(-np.inf))
    return below if np.isfinite(below) and Fraction(float(below)) >= exact else near


@settings(max_examples=30)
@given(first=words, second=words, third=words)
def test_arithmetic_of_any_bits(
    first: list[int], second: list[int], third: list[int], device: torch.device
) -> None:
    a, b, c = (np.array(x, np.uint32) for x in (first, second, third))
    got = run_arithmetic(device, a, b, c)
    x, y = a.view(np.float32), b.view(np.float32)
    a2 = np.ascontiguousarray(a).view(np.float16).reshape(-1, 2)

    def same_halves(name: str, expected: np.ndarray) -> None:
        mine = np.ascontiguousarray(got[name]).view(np.float16).reshape(-1, 2)
        np.testing.assert_array_equal(mine, expected.astype(np.float16).reshape(-1, 2), name)

    with np.errstate(all="ignore"):
        same_halves("pack_half2", np.stack([x, y], axis=1))
        np.testing.assert_array_equal(got["to_half"].astype(np.uint16).view(np.float16), x.astype(np.float16))
        np.testing.assert_array_equal(got["low_half"].view(np.float32), a2[:, 0].astype(np.float32))
        wide = np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype(np.float64)
        for name, exact in {
            "exp2": np.exp2(wide), "log2": np.log2(wide), "rcp": 1 / wide, "rsqrt": 1 / np.sqrt(wide),
        }.items():  # fmt: skip
            mine = got[name].view(np.float32)
            near_one = 2.0**-21 if name == "log2" else 2.0**-126
            np.testing.assert_allclose(mine, exact.astype(np.float32), rtol=2.0**-21, atol=near_one)
        z = c.view(np.float32)
        up = [rounded_up(*map(float, abc)) for abc in zip(x, y, z, strict=True)]
        np.testing.assert_array_equal(got["multiply_add_up"].view(np.float32), np.array(up, np.float32))
    assert (got["lop3"] == ((a & b) | (~a & c))).all()
    both = b.astype(np.uint64) << np.uint64(32) | a
    for i in range(4):
        pick = c >> (4 * i) & 0xF
        byte = (both >> (8 * (pick & 7)).astype(np.uint64)).astype(np.uint32) & 0xFF
        byte = np.where(pick & 8, (byte >> 7) * 0xFF, byte)
        assert (got["byte_permute"] >> (8 * i) & 0xFF == byte).all()
