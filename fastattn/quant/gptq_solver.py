"""GPTQ (Frantar et al., arXiv 2210.17323): weights rounded so that a layer's outputs change least.

For ``y = W x`` and inputs x seen in calibration, the rounded Q minimizes ``||W X - Q X||^2`` greedily, one
column after the other. With ``H = 2 X X^T`` and the upper Cholesky factor U of its inverse, column j is
rounded to nearest and its error spread over the columns not yet visited (Algorithm 1):

    e = (W[:, j] - Q[:, j]) / U[j, j];   W[:, j:] -= e U[j, j:]

Columns run in blocks, and a block's errors reach the columns after it in one matrix product. What differs
from the paper: U comes from one factorization of H (below) and not from that of an explicit inverse; the
scale of a group minimizes ``sum_j (W[:, j] - Q[:, j])^2 / U[j, j]^2``, the loss that eq. (2) charges for the
group's columns; columns that were never active are rounded like any other and not set to zero; and a row for
which plain rounding does better under H is rounded plainly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .column_order import ColumnOrder
from .grid import Grid, Params, fit, round_to, value

_BLOCK = 128  # columns whose errors are pushed on together; Algorithm 1's B
_CONDITION = 1e-2  # float32 factors whose error may exceed this are computed again in float64


class Quantized(NamedTuple):
    """A matrix (out, in) as integers: ``scales[:, g] * (codes - zeros[:, g])`` with ``g = g_idx[column]``."""

    codes: Tensor  # uint8 (out, in)
    scales: Tensor  # float16 (out, groups)
    zeros: Tensor  # uint8 (out, groups)
    g_idx: Tensor  # int32 (in,)

    def dequantize(self) -> Tensor:
        """float32 (out, in), exact."""
        groups = self.g_idx.long()
        return (self.codes.float() - self.zeros.float()[:, groups]) * self.scales.float()[:, groups]

    def split(self, sizes: Sequence[int]) -> list[Quantized]:
        """Cuts along out, each with its own g_idx, since files cannot share one."""
        codes, scales, zeros = (t.split(list(sizes)) for t in (self.codes, self.scales, self.zeros))
        return [Quantized(c, s, z, self.g_idx.clone()) for c, s, z in zip(codes, scales, zeros, strict=True)]


class Hessian:
    """``H = 2 X X^T / n`` of the n inputs of a linear layer, summed up piece by piece in float32."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, columns)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Inputs (n, in), float32."""
        self._sum.addmm_(x.T, x)
        self.rows += x.shape[0]

    def matrix(self) -> Tensor:
        """(in, in). Raises ValueError when an input was not finite or none was given."""
        if not self.rows:
            raise ValueError("hessian: no inputs, expected at least one")
        if not bool(self._sum.isfinite().all()):
            raise ValueError("hessian: not finite: an activation of the calibration text overflows")
        return self._sum * (2 / self.rows)


def round_to_nearest(
    weight: Tensor, grid: Grid, g_idx: Tensor, importance: Tensor | None = None
) -> Quantized:
    """Every weight of ``weight`` (out, in) to the nearest value of its group's grid.

    ``importance`` (in,) weighs the columns' errors where scales are searched; default: all alike.
    """
    _check_weight(weight)
    wt = weight.T.contiguous()
    each = wt.new_ones(len(wt)) if importance is None else importance.to(wt.dtype)
    params = _fit_all(wt, grid, g_idx, each)
    groups = g_idx.long()
    codes = round_to(wt, Params(params.scale[groups], params.zero[groups]), grid)
    return _quantized(codes, params, g_idx)


def solve(
    weight: Tensor, hessian: Tensor, grid: Grid, order: ColumnOrder, *, damp: float = 0.01
) -> Quantized:
    """Quantizes ``weight`` (out, in) for inputs of second moments ``hessian`` (in, in).

    Computes in the dtype of ``weight``, float32 or float64. Each row keeps the better of GPTQ and rounding to
    nearest, so that ``error`` is never above that of `round_to_nearest`.

    ``order`` has to visit group after group. ``damp``: of the mean diagonal of H, added to the diagonal.
    Raises ValueError when weights or H are not finite, or H is not positive definite in spite of ``damp``.
    """
    _check_weight(weight)
    if hessian.shape != (weight.shape[1],) * 2 or not bool(hessian.isfinite().all()):
        raise ValueError(f"hessian: {tuple(hessian.shape)}, expected finite ({weight.shape[1]},) * 2")
    visit = order.visit
    hessian = hessian.to(weight.dtype)
    factor = inverse_factor(hessian, visit, damp)
    wt = weight.T[visit].contiguous()
    groups = order.g_idx[visit].long()
    charge = factor.diagonal().square().reciprocal()
    codes, params = _sweep(wt, factor, groups, grid, charge)
    by_column = torch.empty_like(codes)
    by_column[visit] = codes
    solved = _quantized(by_column, params, order.g_idx)
    plain = round_to_nearest(weight, grid, order.g_idx, hessian.diagonal().clamp(min=1e-30))
    return _better_rows(weight, hessian, solved, plain)


def inverse_factor(hessian: Tensor, visit: Tensor, damp: float) -> Tensor:
    """Upper triangular U with ``U^T U = (H + damp mean(diag H) I)^-1``, H in the order ``visit``; its dtype.

    H in reversed order has a Cholesky factor L; L reversed back is an upper triangular R with H = R R^T, and
    U = R^-1, which is L^-1 reversed back: one factorization, whose error grows with the condition of H and
    not with its square. In float64 where float32 would leave less than two digits. L replaces the copy of H,
    and L^-1 the identity: beside H, two matrices are held at a time.
    """
    mean = float(hessian.diagonal().mean())
    if mean == 0:  # no input was ever active: nothing tells the columns apart
        return torch.eye(len(hessian), dtype=hessian.dtype)
    last_first = visit.flip(0)
    for dtype in dict.fromkeys((hessian.dtype, torch.float64)):
        lower = hessian[last_first[:, None], last_first].to(dtype).mT  # LAPACK works on columns in place
        lower.diagonal().add_(damp * mean)
        info = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32))).info
        diagonal = lower.diagonal()
        if int(info) or not bool(diagonal.isfinite().all()):
            continue
        spread = float((diagonal.max() / diagonal.min()).square())
        if dtype == torch.float64 or spread * len(hessian) ** 0.5 * torch.finfo(dtype).eps < _CONDITION:
            inverse = torch.eye(len(hessian), dtype=dtype).mT
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower, diagonal
            return inverse.to(hessian.dtype).flip(0, 1)
    raise ValueError(f"hessian: not positive definite with damp {damp:g}; use a larger one")


def _sweep(wt: Tensor, factor: Tensor, groups: Tensor, grid: Grid, charge: Tensor) -> tuple[Tensor, Params]:
    """Algorithm 1 on the rows of ``wt`` (in, out), which it overwrites: codes, and params by group."""
    out = wt.shape[1]
    codes = torch.empty_like(wt)
    params = Params(*wt.new_zeros(2, int(groups.max()) + 1, out))
    spans = _spans(groups.tolist())
    for lo, hi in _blocks(spans):
        w, errors = wt[lo:hi].clone(), wt.new_empty(hi - lo, out)
        u = factor[lo:hi, lo:hi]
        for i in range(hi - lo):
            column, group = lo + i, groups[lo + i]
            if end := spans.get(column):
                fresh = w[i : end - lo] if end <= hi else wt[column:end]  # a long group begins its block
                scale, zero = fit(fresh, grid, charge[column:end])
                params.scale[group], params.zero[group] = scale, zero
            own = Params(params.scale[group], params.zero[group])
            codes[column] = round_to(w[i], own, grid)
            errors[i] = (w[i] - value(codes[column], own)) / u[i, i]
            w[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        wt[hi:].addmm_(factor[lo:hi, hi:].T, errors, alpha=-1)
    return codes, params


def _spans(groups: list[int]) -> dict[int, int]:
    """First column of each group, in visiting order, to one past its last."""
    starts = [i for i, g in enumerate(groups) if i == 0 or groups[i - 1] != g]
    if len({groups[i] for i in starts}) != len(starts):
        raise ValueError("order: leaves a group and returns to it, expected group after group")
    return dict(zip(starts, [*starts[1:], len(groups)], strict=True))


def _blocks(spans: dict[int, int]) -> list[tuple[int, int]]:
    """About `_BLOCK` columns each; a group lies within a block or begins with one."""
    blocks: list[tuple[int, int]] = []
    for lo, hi in spans.items():
        if blocks and hi - blocks[-1][0] <= _BLOCK:
            blocks[-1] = (blocks[-1][0], hi)
        else:
            blocks += [(at, min(at + _BLOCK, hi)) for at in range(lo, hi, _BLOCK)]
    return blocks


def _fit_all(wt: Tensor, grid: Grid, groups: Tensor, importance: Tensor) -> Params:
    """Params (groups, out) of every group of the rows of ``wt`` (in, out)."""
    fits = []
    for group in range(int(groups.max()) + 1):
        mine = (groups == group).nonzero().flatten()
        fits.append(fit(wt[mine], grid, importance[mine]))
    return Params(torch.stack([p.scale for p in fits]), torch.stack([p.zero for p in fits]))


def _quantized(codes: Tensor, params: Params, g_idx: Tensor) -> Quantized:
    """From (in, out) and (groups, out) to the order of the matrix."""
    return Quantized(
        codes.T.to(torch.uint8, memory_format=torch.contiguous_format),
        params.scale.T.half().contiguous(),
        params.zero.T.to(torch.uint8, memory_format=torch.contiguous_format),
        g_idx,
    )


def _better_rows(weight: Tensor, hessian: Tensor, a: Quantized, b: Quantized) -> Quantized:
    """Of each row the one with less error ``(w - q) H (w - q)^T``."""
    keep = (error(weight, hessian, a) <= error(weight, hessian, b))[:, None]
    codes, scales, zeros = (torch.where(keep, x, y) for x, y in zip(a[:3], b[:3], strict=True))
    return Quantized(codes, scales, zeros, a.g_idx)


def error(weight: Tensor, hessian: Tensor, q: Quantized) -> Tensor:
    """What rounding changes each row's output by, squared and summed over the inputs: (out,)."""
    change = weight - q.dequantize().to(weight.dtype)
    return (change @ hessian).mul_(change).sum(1)


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64) or not weight.numel():
        raise ValueError(
            f"weight: {weight.dtype} {tuple(weight.shape)}, expected float32 or float64 (out, in)"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: holds values that are not finite")
