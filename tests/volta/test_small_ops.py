"""RMSNorm, gate and rotary embedding against float64, in the emulator."""

from __future__ import annotations

import re

import pytest
import torch

from cuda_volta.gate import swiglu
from cuda_volta.norm import rms_norm
from cuda_volta.rotary import rotary
from fastattn import reference_ops
from fastattn.backends import torch_ops
from fastattn.spec import RmsNormArgs, RotaryArgs, SwigluArgs
from tests.ops.runners import assert_accurate, random
from tests.ops.test_rotary_append import SHAPES, STYLES, angles, plain_rotary

pytestmark = pytest.mark.toolchain
HALF = torch.float16


@pytest.mark.parametrize("hidden", [1, 7, 64, 200, 2048, 2050, 4096])
@pytest.mark.parametrize("weight_dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["plain", "residual"])
def test_rms_norm(hidden, weight_dtype, add):
    for rows in (1, 3):
        x = random(rows, hidden, seed=1, dtype=HALF)
        residual = random(rows, hidden, seed=2, dtype=HALF, scale=3.0) if add else None
        weight = random(hidden, seed=3, dtype=weight_dtype)
        args = RmsNormArgs(x, weight, 1e-5, residual)
        normed, total = rms_norm(x, weight, 1e-5, residual)
        exact, exact_total = reference_ops.rms_norm(args)
        assert_accurate(normed, torch_ops.rms_norm(args)[0], exact)
        assert torch.equal(total, exact_total)


def test_rms_norm_of_rows_inside_something_wider():
    wide, residual = random(2, 3, 80, seed=4, dtype=HALF), random(2, 3, 72, seed=5, dtype=HALF)
    weight = random(64, seed=6, dtype=HALF)
    for x, r in ((wide[..., 8:72], residual[..., 8:]), (wide[..., 3:67], residual[..., 1:65])):
        for given in (None, r):
            same = rms_norm(x.contiguous(), weight, 1e-6, None if given is None else given.contiguous())
            for ours, expected in zip(rms_norm(x, weight, 1e-6, given), same, strict=True):
                assert torch.equal(ours, expected)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 100.0])
def test_rms_norm_of_any_magnitude(scale):
    x, weight = random(2, 96, seed=7, dtype=HALF, scale=scale), torch.ones(96, dtype=HALF)
    args = RmsNormArgs(x, weight, 1e-6)
    assert_accurate(rms_norm(*args[:3])[0], torch_ops.rms_norm(args)[0], reference_ops.rms_norm(args)[0])


@pytest.mark.parametrize("width", [1, 3, 8, 20, 64, 1000, 5504])
@pytest.mark.parametrize("rows", [1, 5])
def test_swiglu(width, rows):
    x = random(rows, 2 * width, seed=1, dtype=HALF, scale=4.0)
    x[0, 0], x[-1, width - 1] = 30000.0, -30000.0
    x[:, width:] *= 0.1
    args = SwigluArgs(x)
    assert_accurate(swiglu(x), torch_ops.swiglu(args), reference_ops.swiglu(args))


def test_swiglu_of_any_shape():
    x = random(2, 3, 48, seed=2, dtype=HALF)
    assert torch.equal(swiglu(x).flatten(0, 1), swiglu(x.flatten(0, 1)))
    assert torch.equal(swiglu(x[..., 4:20]), swiglu(x[..., 4:20].contiguous()))
    assert swiglu(x[:0]).shape == (0, 3, 24)


@STYLES
@pytest.mark.parametrize(("shape", "rotary_dim"), SHAPES, ids=str)
def test_rotary(interleaved, shape, rotary_dim):
    x = random(*shape, seed=1, dtype=HALF)
    cos, sin = angles(rotary_dim)
    positions = torch.randint(0, 50, (shape[0],), generator=torch.Generator().manual_seed(2))
    ours = rotary(x, cos, sin, positions, interleaved)
    assert ours.is_contiguous()
    exact = reference_ops.rotary(RotaryArgs(x, cos, sin, positions, interleaved))
    assert_accurate(ours, plain_rotary(x, cos, sin, positions, interleaved), exact)
    assert torch.equal(ours[..., rotary_dim:], x[..., rotary_dim:])


@STYLES
def test_rotary_of_heads_inside_a_fused_projection(interleaved):
    x = random(6, 3 * 32 + 16, seed=3, dtype=HALF)[:, 16:].view(6, 3, 32)
    cos, sin = angles(32)
    plain = rotary(x.contiguous(), cos, sin, torch.arange(6), interleaved)
    assert torch.equal(rotary(x, cos, sin, torch.arange(6), interleaved), plain)


def test_a_position_outside_the_table_is_the_nearest_in_it():
    x = random(4, 2, 16, seed=4, dtype=HALF)
    cos, sin = angles(16)
    hostile = torch.tensor([-1, 50, 1 << 62, -(1 << 62)])
    near = torch.tensor([0, 49, 49, 0])
    assert torch.equal(rotary(x, cos, sin, hostile), rotary(x, cos, sin, near))


BAD = {
    "x: torch.bfloat16, expected torch.float16; Volta has no bfloat16: convert with .half()": lambda: swiglu(
        torch.zeros(2, 8, dtype=torch.bfloat16)
    ),
    "x: last dimension 7 is odd": lambda: swiglu(torch.zeros(2, 7, dtype=HALF)),
    "x: stride 2 in the last dimension": lambda: swiglu(torch.zeros(2, 16, dtype=HALF)[:, ::2]),
    "weight: torch.float64": lambda: rms_norm(torch.zeros(2, 8, dtype=HALF), torch.ones(8).double(), 1e-6),
    "weight: torch.float32 (7,), expected torch.float16 or torch.float32 (8,)": lambda: rms_norm(
        torch.zeros(2, 8, dtype=HALF), torch.ones(7), 1e-6
    ),
    "residual: (3, 8), x is (2, 8)": lambda: rms_norm(
        torch.zeros(2, 8, dtype=HALF), torch.ones(8), 1e-6, torch.zeros(3, 8, dtype=HALF)
    ),
    "positions: torch.int32": lambda: rotary(
        torch.zeros(2, 1, 8, dtype=HALF), *angles(8), torch.zeros(2, dtype=torch.int32)
    ),
    "cos: torch.float32 (50, 5), expected float32 (max_position, at most 4)": lambda: rotary(
        torch.zeros(2, 1, 8, dtype=HALF), *angles(10), torch.zeros(2, dtype=torch.int64)
    ),
    "cos: (0, 4), expected at least one position": lambda: rotary(
        torch.zeros(2, 1, 8, dtype=HALF), *torch.zeros(2, 0, 4), torch.zeros(2, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        BAD[message]()
