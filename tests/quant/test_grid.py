"""Scales and zero points: in range, exact in float16, and better when searched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.quant.grid import Grid, fit, round_to, value


@given(
    columns=st.integers(1, 40),
    out=st.integers(1, 9),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    exponent=st.integers(-12, 4),
    shift=st.sampled_from([0.0, 1.0, -3.0]),
    seed=st.integers(0, 1000),
)
def test_search_is_never_worse(
    columns: int, out: int, bits: int, sym: bool, exponent: int, shift: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    w = (torch.randn(columns, out, generator=g) + shift) * 10.0**exponent
    importance = torch.rand(columns, generator=g)
    errors = []
    for search in (True, False):
        grid = Grid(bits, sym, search)
        p = fit(w, grid, importance)
        q = round_to(w, p, grid)
        assert torch.equal(p.scale, p.scale.half().float())
        assert bool((p.scale != 0).all())
        for integers in (q, p.zero):
            assert torch.equal(integers, integers.round())
            assert 0 <= float(integers.min()) <= float(integers.max()) <= grid.top
        errors.append(importance.double() @ (value(q, p) - w).double().square())
    assert bool((errors[0] <= errors[1] * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_min_max_rounds_within_half_a_step(bits: int) -> None:
    w = torch.randn(64, 10) + 0.5
    for sym in (True, False):
        grid = Grid(bits, sym, search=False)
        p = fit(w, grid, torch.ones(64))
        # The largest symmetric weight lies half a step beyond the grid; a zero point is off by half a step.
        assert bool(((value(round_to(w, p, grid), p) - w).abs() <= p.scale * 1.01).all())


def test_a_negative_scale_reaches_the_far_end() -> None:
    """The one large weight sets the scale; the grid's longer side should face it, whatever its sign."""
    small = torch.linspace(-0.02, 0.02, 31)
    for far in (8.0, -8.0):
        w = torch.cat((small, torch.tensor([far])))[:, None]
        p = fit(w, Grid(4, True), torch.ones(32))
        assert float(value(round_to(w, p, Grid(4, True)), p)[-1, 0]) == pytest.approx(far, rel=1e-2)
        assert float(p.scale[0]) * far < 0


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
def test_groups_of_zeros_and_of_next_to_nothing(sym: bool) -> None:
    for w in (torch.zeros(8, 3), torch.full((8, 3), 1e-30), torch.full((8, 3), -1e-9)):
        p = fit(w, Grid(4, sym), torch.ones(8))
        assert bool((value(round_to(w, p, Grid(4, sym)), p).abs() <= 2.0**-23).all())


def test_an_asymmetric_grid_holds_zero() -> None:
    w = torch.rand(32, 5) + 3
    p = fit(w, Grid(4, False), torch.ones(32))
    assert bool((p.zero == 0).all())
    assert bool((value(p.zero, p) == 0).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_beyond_float16_scales_are_refused(bad: float) -> None:
    w = torch.ones(4, 2)
    w[1, 1] = bad
    with pytest.raises(ValueError, match="weight: a group spans"):
        fit(w, Grid(4, True), torch.ones(4))
