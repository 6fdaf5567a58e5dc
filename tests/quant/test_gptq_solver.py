"""GPTQ against the paper's own recursion in float64, and what must hold of every problem."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastattn.quant import column_order as orders
from fastattn.quant.column_order import ColumnOrder
from fastattn.quant.gptq_solver import Hessian, error, inverse_factor, round_to_nearest, solve
from fastattn.quant.grid import Grid
from lib import memory


def problem(out: int, inn: int, seed: int = 0, rows: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and the moments of correlated inputs with a few large channels, float64."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, inn, generator=g, dtype=torch.float64)
    mix = torch.randn(inn, inn, generator=g, dtype=torch.float64) / inn**0.5 + torch.eye(inn)
    x = torch.randn(rows or 4 * inn, inn, generator=g, dtype=torch.float64) @ mix
    x *= torch.rand(inn, generator=g, dtype=torch.float64).mul(3).exp()
    return w, 2 * x.T @ x / len(x)


def min_max(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero (out,) over the range of ``w`` (out, columns)."""
    low, high = w.min(1).values.clamp(max=0), w.max(1).values.clamp(min=0)
    if grid.sym:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / grid.top).half().double()
    zero = torch.full_like(scale, 2 ** (grid.bits - 1)) if grid.sym else (-low / scale).round()
    return scale, zero.clamp(0, grid.top)


def paper(w: Tensor, h: Tensor, grid: Grid, order: ColumnOrder, damp: float) -> Tensor:
    """Dequantized (out, in): eq. (2) and (3) column by column, with the explicit inverse."""
    w, inn = w.clone(), w.shape[1]
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(inn))
    result = torch.empty_like(w)
    params: dict[int, tuple[Tensor, Tensor]] = {}
    for j in order.visit.tolist():
        group = int(order.g_idx[j])
        if group not in params:
            params[group] = min_max(w[:, order.g_idx == group], grid)
        scale, zero = params[group]
        q = ((w[:, j] / scale).round() + zero).clamp(0, grid.top)
        result[:, j] = (q - zero) * scale
        w -= torch.outer((w[:, j] - result[:, j]) / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        w[:, j], inverse[j], inverse[:, j] = result[:, j], 0, 0
        inverse[j, j] = 1
    return result


def better_of(w: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    norms = [((w - q) @ h * (w - q)).sum(1, keepdim=True) for q in (a, b)]
    return torch.where(norms[0] <= norms[1], a, b)


CASES = [
    pytest.param(24, 96, 32, id="whole-groups"),
    pytest.param(17, 150, 64, id="short-last-group"),
    pytest.param(5, 140, -1, id="one-group-over-blocks"),
    pytest.param(9, 40, 64, id="group-above-in"),
]


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("out", "inn", "group_size"), CASES)
@pytest.mark.parametrize("kind", ["position", "activation", "group", "heads"])
def test_equals_the_paper(out: int, inn: int, group_size: int, bits: int, sym: bool, kind: str) -> None:
    w, h = problem(out, inn, seed=bits)
    grid, energy = Grid(bits, sym, search=False), h.diagonal()
    order = {
        "position": lambda: orders.by_position(inn, group_size),
        "activation": lambda: orders.by_activation(energy, group_size),
        "group": lambda: orders.by_group(energy, group_size),
        "heads": lambda: orders.within_heads(energy, group_size, 2 if inn % 2 == 0 else 1, 1),
    }[kind]()
    q = solve(w, h, grid, order, damp=0.02)
    expected = paper(w, h, grid, order, 0.02)
    plain = round_to_nearest(w, grid, order.g_idx).dequantize().double()
    assert torch.equal(q.dequantize().double(), better_of(w, h, expected, plain))


@pytest.mark.parametrize("search", [True, False])
def test_float32_is_as_good_as_float64(search: bool) -> None:
    w, h = problem(64, 256)
    grid, order = Grid(4, True, search), orders.by_activation(h.diagonal(), 64)
    exact, single = solve(w, h, grid, order), solve(w.float(), h.float(), grid, order)
    assert (exact.codes == single.codes).float().mean() > 0.99
    sums = [float(error(w, h, q).sum()) for q in (exact, single)]
    assert sums[1] == pytest.approx(sums[0], rel=2e-3)


@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("search", [True, False])
def test_a_diagonal_hessian_means_round_to_nearest(sym: bool, search: bool) -> None:
    w, _ = problem(20, 96)
    energy = torch.rand(96, dtype=torch.float64) + 0.1
    grid, order = Grid(4, sym, search), orders.by_activation(energy, 32)
    damped = energy + 0.01 * energy.mean()
    expected = round_to_nearest(w, grid, order.g_idx, damped)
    for a, b in zip(solve(w, energy.diag(), grid, order), expected, strict=True):
        assert torch.equal(a, b)


@given(
    out=st.integers(1, 20),
    inn=st.integers(1, 150),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, -1]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    rows=st.integers(1, 200),
    seed=st.integers(0, 10_000),
)
def test_never_worse_than_round_to_nearest(
    out: int, inn: int, bits: int, group_size: int, flags: tuple[bool, bool, bool], rows: int, seed: int
) -> None:
    sym, search, in_place = flags
    w, h = problem(out, inn, seed, rows)
    grid, energy = Grid(bits, sym, search), h.diagonal()
    order = (orders.by_group if in_place else orders.by_activation)(energy, group_size)
    q = solve(w, h, grid, order)
    plain = round_to_nearest(w, grid, order.g_idx, energy.clamp(min=1e-30))
    assert bool((error(w, h, q) <= error(w, h, plain)).all())
    assert int(q.codes.max()) <= grid.top
    assert q.codes.shape == (out, inn)
    assert q.scales.shape == q.zeros.shape == (out, int(order.g_idx.max()) + 1)
    assert bool(q.scales.isfinite().all())


def test_correlated_inputs_gain_most() -> None:
    w, h = problem(64, 256)
    grid, order = Grid(3, True, False), orders.by_activation(h.diagonal(), 128)
    plain = error(w, h, round_to_nearest(w, grid, order.g_idx)).sum()
    assert error(w, h, solve(w, h, grid, order)).sum() < 0.5 * plain


def test_columns_that_were_never_active_are_rounded() -> None:
    w, h = problem(8, 64)
    dead = torch.tensor([3, 40, 63])
    h[dead], h[:, dead] = 0, 0
    order = orders.by_position(64, 32)
    q = solve(w, h, Grid(4, True, False), order).dequantize().double()
    plain = round_to_nearest(w, Grid(4, True, False), order.g_idx)
    assert torch.equal(q[:, 3], plain.dequantize()[:, 3].double())  # before any error reached its group
    step = plain.scales.double().max()
    assert bool(((q - w)[:, dead].abs() <= step).all())


def test_inputs_of_zeros_mean_round_to_nearest() -> None:
    w, _ = problem(8, 64)
    order = orders.by_position(64, 32)
    q = solve(w, torch.zeros(64, 64, dtype=torch.float64), Grid(4, False), order)
    expected = round_to_nearest(w, Grid(4, False), order.g_idx)
    assert torch.equal(q.codes, expected.codes)


def test_factor_of_an_ill_conditioned_hessian() -> None:
    """Where float32 alone would be wrong by far more than it may be, float64 takes over."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    h = (basis * torch.logspace(0, -7, 64, dtype=torch.float64)) @ basis.T
    h = (h + h.T) / 2
    u = inverse_factor(h.float(), torch.arange(64), damp=1e-9)
    damped = h.float().double() + 1e-9 * h.float().diagonal().mean() * torch.eye(64)
    assert torch.equal(u, u.triu())
    torch.testing.assert_close(u.double().T @ u.double() @ damped, torch.eye(64).double(), atol=1e-2, rtol=0)


def test_a_factor_needs_two_matrices_beside_the_hessian() -> None:
    """Llama-70B's down projection has 3.3 GB a matrix."""
    h = torch.eye(3000) + 0.1
    inverse_factor(h, torch.arange(3000), 0.01)  # brings threads and their workspaces
    memory.reset_peak()
    before = memory.peak_bytes()
    u = inverse_factor(h, torch.randperm(3000), 0.01)
    assert memory.peak_bytes() - before < 2.3 * u.nbytes


def test_what_cannot_be_solved_is_refused() -> None:
    w, h = problem(4, 32)
    order, grid = orders.by_position(32, 32), Grid(4, True)
    cases: list[tuple[Any, Any, str]] = [
        (w, h[:31], r"hessian: \(31, 32\)"),
        (w, h * torch.nan, "hessian"),
        (w, -h, "damp|hessian"),
        (w.half(), h, "weight: torch.float16"),
        (w[:0], h, r"weight: torch.float64 \(0, 32\)"),
        (w * torch.inf, h, "weight: holds values that are not finite"),
        (w * 1e7, h, "weight: a group spans .*beyond float16"),
    ]
    for weight, hessian, message in cases:
        with pytest.raises(ValueError, match=message):
            solve(weight, hessian, grid, order)
    indefinite = torch.eye(32, dtype=torch.float64)
    indefinite[0, 1] = indefinite[1, 0] = 3
    with pytest.raises(ValueError, match=r"not positive definite with damp 0\.01"):
        solve(w, indefinite, grid, order)
    back = ColumnOrder(torch.arange(32), torch.arange(32, dtype=torch.int32) % 2)
    with pytest.raises(ValueError, match="order: leaves a group and returns"):
        solve(w, h, grid, back)


def test_hessian_sums_pieces() -> None:
    x = torch.randn(50, 12)
    hessian = Hessian(12)
    with pytest.raises(ValueError, match="no inputs"):
        hessian.matrix()
    for part in x.split([7, 0, 30, 13]):
        hessian.add(part)
    torch.testing.assert_close(hessian.matrix(), 2 * x.T @ x / 50)
    hessian.add(torch.full((1, 12), 1e30))
    with pytest.raises(ValueError, match="not finite"):
        hessian.matrix()
