"""``y = x @ W^T`` with W in groups of 4- or 8-bit integers, by the way that suits the rows of x.

Few rows: `linear_few`, bound by W's bytes. Many rows: `linear_many`, bound by the tensor cores. Many rows
that it does not take (float32, act-order by g_idx, groups that no step fits, GPUs for which Triton has no
tensor cores): W is dequantized slab by slab and torch's GEMM multiplies. Dense weights are torch's own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from triton import cdiv

from ..spec import LinearArgs, PackedWeight
from .dequantize import dequantize
from .device import Chip, chip
from .linear_few import few_rows
from .linear_many import many_rows_tile, run_many

#: Rows of x that the kernel for few takes: with tensor cores, and where Triton multiplies by FMAs.
FEW_ROWS, FEW_ROWS_BY_FMA = 128, 16
_SLAB = 1 << 23  # values of a slab: 16 MB in half precision, well inside the L2 of an A100 or H100
_SLAB_ROWS = 128  # of W and of x, that a block of torch's GEMM has at least


def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` (N, out) in x's dtype."""
    w = a.weight
    x = a.x if w.x_perm is None else a.x.index_select(1, w.x_perm)
    if w.format == "dense":
        return _dense(x, w.tensors["weight"], w.bias)
    if not x.numel() or not w.shape[0]:
        bias = 0.0 if w.bias is None else w.bias.to(x.dtype)
        return x.new_zeros((x.shape[0], w.shape[0])) + bias
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    c = chip(x.device)
    if x.shape[0] <= (FEW_ROWS if c.tensor_cores else FEW_ROWS_BY_FMA):
        return few_rows(x, w)
    tile = many_rows_tile(x, w)
    if tile is not None:
        return run_many(x, w, tile)
    return _through_slabs(x, w, slab_rows(x.shape[0], w.shape[1], c))


def slab_rows(rows: int, columns: int, c: Chip) -> int:
    """Rows of W that are dequantized at once: as many as stay in L2, or more where those would not give each
    processor a block of torch's GEMM. So a slab has at most ``128 * processors`` rows.
    """
    filling = cdiv(c.processors, cdiv(rows, _SLAB_ROWS)) * _SLAB_ROWS
    return max(_SLAB // columns // _SLAB_ROWS * _SLAB_ROWS, filling)


def _through_slabs(x: Tensor, w: PackedWeight, step: int) -> Tensor:
    out = x.new_empty((x.shape[0], w.shape[0]))
    for first in range(0, w.shape[0], step):
        count = min(step, w.shape[0] - first)
        slab = dequantize(w, x.dtype, first=first, rows=count, stored=True)
        bias = None if w.bias is None else w.bias[first : first + count]
        out[:, first : first + count] = _dense(x, slab, bias)
    return out


def _dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
