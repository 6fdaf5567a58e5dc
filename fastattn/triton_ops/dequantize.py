"""Packed weights back to floats: rows of an embedding, and slabs of a matrix for a dense GEMM."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import EmbeddingArgs, PackedWeight

_WIDTH = 1024  # columns of a program


@triton.jit
def code_at(codes, row, column, INT4: tl.constexpr, inside):
    """The integer of W[row, column], float32; ``codes`` as quant/packed.py lays them out, a row's stride given."""
    if INT4:
        place = column % 32
        byte = tl.load(codes + row + column // 32 * 16 + place % 16, inside, 0).to(tl.int32)
        return ((byte >> tl.where(place < 16, 0, 4)) & 15).to(tl.float32)
    return tl.load(codes + row + column, inside, 0).to(tl.float32)


@triton.jit
def _dequantize(
    codes, scales, mins, g_idx, x_perm, ids, out, first_row, num_rows,
    codes_stride, scales_stride, mins_stride, ids_stride, COLUMNS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    GROUP_OFFSET: tl.constexpr, FORMAT: tl.constexpr, MINS: tl.constexpr, SCATTERED: tl.constexpr,
    PERMUTED: tl.constexpr, CHOSEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row = place + first_row
    if CHOSEN:
        row = tl.minimum(tl.maximum(tl.load(ids + place * ids_stride), 0), num_rows - 1)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < COLUMNS
    if FORMAT == "dense":
        w = tl.load(codes + row * codes_stride + column, inside, 0.0).to(tl.float32)
    else:
        if SCATTERED:
            group = tl.load(g_idx + column, inside, 0)
        else:
            group = (column + GROUP_OFFSET) // GROUP_SIZE
        q = code_at(codes, row * codes_stride, column, FORMAT == "int4", inside)
        w = q * tl.load(scales + row * scales_stride + group, inside, 0.0).to(tl.float32)
        if MINS:
            w += tl.load(mins + row * mins_stride + group, inside, 0.0).to(tl.float32)
    if PERMUTED:
        column = tl.load(x_perm + column, inside, 0)
    tl.store(out + place * COLUMNS + column, w.to(out.dtype.element_ty), inside)


def dequantize(
    w: PackedWeight, dtype: torch.dtype, ids: Tensor | None = None, first: int = 0, rows: int | None = None,
    stored: bool = False,
) -> Tensor:  # fmt: skip
    """Rows ``ids``, or ``rows`` rows from ``first``, of the matrix (out, in), in ``dtype``.

    ``stored``: columns in the order of the codes rather than of x. Ids out of range are clamped.
    """
    t = w.tensors
    codes = unit_stride(t["weight"] if w.format == "dense" else t["codes"])
    scales = codes if w.format == "dense" else unit_stride(t["scales"])
    mins = unit_stride(t["mins"]) if "mins" in t else scales
    count = ids.shape[0] if ids is not None else w.shape[0] - first if rows is None else rows
    out = torch.empty((count, w.shape[1]), dtype=dtype, device=codes.device)
    if out.numel():
        width = min(_WIDTH, triton.next_power_of_2(w.shape[1]))
        permuted = w.x_perm is not None and not stored
        _dequantize[(count, triton.cdiv(w.shape[1], width))](
            codes, scales, mins, codes if w.g_idx is None else w.g_idx, w.x_perm if permuted else codes,
            codes if ids is None else ids, out, first, w.shape[0],
            codes.stride(0), scales.stride(0), mins.stride(0), 0 if ids is None else ids.stride(0),
            COLUMNS=w.shape[1], GROUP_SIZE=w.group_size, GROUP_OFFSET=w.group_offset, FORMAT=w.format,
            MINS="mins" in t, SCATTERED=w.g_idx is not None, PERMUTED=permuted, CHOSEN=ids is not None,
            WIDTH=width,
        )  # fmt: skip
    return out


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W, (N, in) in ``dtype``: reads those rows only."""
    return dequantize(a.weight, a.dtype, a.ids)


def unit_stride(t: Tensor) -> Tensor:
    """``t`` itself, or a copy when its last dimension is not contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
