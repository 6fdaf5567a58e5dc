"""The small ops on tensors: picks blocks, allocates results, launches the Triton kernels.

As `attention`: compiled by triton-ascend on NPU tensors, interpreted on CPU tensors. Indices that a device
holds are clamped or skipped there, never read back. Weights are in fastattn's layout (`kernels.weights`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import chip_of
from .chips import Chip
from .launch import kernel

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_ROW_BLOCK = 4096  # float32 columns that a vector core holds at once: 16 KiB a buffer, of 192


class Weight(NamedTuple):
    """A matrix (out, in): dense, or integers in groups with ``w = scales[:, g] * q (+ mins[:, g])``."""

    bits: int  # 4, 8, or 16 for dense
    shape: tuple[int, int]
    codes: Tensor  # uint8 (out, in / 2) | int8 (out, in) | floats (out, in)
    scales: Tensor | None = None  # (out, groups)
    mins: Tensor | None = None
    group_size: int = 0
    group_offset: int = 0  # columns of the first group that lie before this piece
    g_idx: Tensor | None = None  # int32 (in,): the group of each column
    x_perm: Tensor | None = None  # the columns are those of x[:, x_perm]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``weight * s / sqrt(mean(s^2) + eps)`` over the last dimension, s = x + residual: (normalised, s).

    Both in x's dtype; s is empty without a residual.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(out)
    hidden = x.shape[-1]
    flat = _rows(x)
    other = None if residual is None else _rows(residual)
    rows = flat.shape[0]
    if x.numel():
        kernel("rms_norm:rms_norm_kernel", x.device)[(min(_chip(x).vector_cores, rows),)](
            flat,
            other,
            weight,
            out,
            None if residual is None else total,
            flat.stride(0),
            0 if other is None else other.stride(0),
            rows,
            hidden,
            eps,
            BLOCK=min(_ROW_BLOCK, _power(hidden)),
        )
    return out, total


def swiglu(x: Tensor) -> Tensor:
    """``silu(gate) * up`` of x (..., 2 F), gate first: (..., F)."""
    flat = _rows(x)
    rows, width = flat.shape[0], x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    block = min(_ROW_BLOCK, _power(width))
    items = rows * -(-width // block)
    if items:
        kernel("swiglu:swiglu_kernel", x.device)[(min(_chip(x).vector_cores, items),)](
            flat, out, flat.stride(0), rows, width, BLOCK=block
        )
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, interleaved: bool = False) -> Tensor:
    """x (N, heads, D) turned by the rows ``positions`` of cos and sin, float32 (max_position, r / 2)."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, heads, dim = x.shape
    half = cos.shape[1]
    if x.numel():
        kernel("rotary:rotary_kernel", x.device)[(min(_chip(x).vector_cores, rows),)](
            x,
            out,
            cos.contiguous(),
            sin.contiguous(),
            positions.contiguous(),
            x.stride(0),
            x.stride(1),
            rows,
            heads,
            half,
            dim,
            cos.shape[0],
            INTERLEAVED=interleaved,
            HEADS=_power(heads),
            HALF=_power(half),
            REST=_power(dim - 2 * half) if dim > 2 * half else 0,
        )
    return out


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Writes row n of k (N, Hkv, D) and v to slot ``slots[n]`` of the pages (P, page, Hkv, D | Dv).

    With cos and sin, keys are turned on the way. Slots that are negative or past the cache are skipped.
    """
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    rows, heads, dim = k.shape
    half = 0 if cos is None else cos.shape[1]
    if not k.numel() + v.numel() or not k_cache.numel():
        return
    kernel("append:append_kernel", k.device)[(min(_chip(k).vector_cores, rows),)](
        k_cache,
        v_cache,
        k,
        v,
        slots.contiguous(),
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
        None if positions is None else positions.contiguous(),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *k.stride()[:2],
        *v.stride()[:2],
        rows,
        heads,
        *k_cache.shape[:2],
        half,
        dim,
        v.shape[2],
        0 if cos is None else cos.shape[0],
        INTERLEAVED=interleaved,
        HEADS=_power(heads),
        HALF=_power(half),
        REST=_power(dim - 2 * half) if dim > 2 * half else 0,
        DIM=_power(dim),
        V_DIM=_power(v.shape[2]),
    )


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ W^T + bias`` for x (N, in): (N, out) in x's dtype; W is dequantized tile by tile."""
    if weight.x_perm is not None:
        x = x.index_select(1, weight.x_perm)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (rows, inn), out_features = x.shape, weight.shape[0]
    if not inn:
        return x.new_zeros((rows, out_features)) + (0 if bias is None else bias.to(x.dtype))
    out = x.new_empty((rows, out_features))
    block_m, block_n, block_k, one_group = linear_blocks(weight, rows)
    tiles = -(-rows // block_m) * -(-out_features // block_n)
    if tiles:
        kernel("linear:linear_kernel", x.device)[(min(_chip(x).cube_cores, tiles),)](
            x,
            weight.codes,
            weight.scales,
            weight.mins,
            weight.g_idx,
            None if bias is None else bias.contiguous(),
            out,
            x.stride(0),
            weight.codes.stride(0),
            0 if weight.scales is None else weight.scales.stride(0),
            rows,
            out_features,
            inn,
            weight.group_size,
            weight.group_offset,
            BITS=weight.bits,
            ONE_GROUP=one_group,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return out


def linear_blocks(weight: Weight, rows: int) -> tuple[int, int, int, bool]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, whether the columns of each tile are of one group).

    BLOCK_K counts bytes of codes: of 4 bits, two columns. The widest tile of one group reads each scale once
    a row of W; groups that no tile fits into, or act-order's, are gathered column by column.
    """
    block_m, block_n = max(16, min(64, _power(rows))), 64
    widest = 128 if weight.bits == 16 else 64
    if weight.bits == 16:
        return block_m, block_n, widest, False
    columns = widest * (2 if weight.bits == 4 else 1)
    while columns >= 32 and (weight.group_size % columns or weight.group_offset % columns):
        columns //= 2
    if weight.g_idx is not None or columns < 32:
        return block_m, 32, 32, False
    return block_m, block_n, columns // (2 if weight.bits == 4 else 1), True


def embedding(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` (N,) of the matrix, (N, in) in ``dtype``."""
    out_features, inn = weight.shape
    out = torch.empty((ids.shape[0], inn), dtype=dtype, device=ids.device)
    width = weight.codes.shape[1]
    block = min(1024, _power(width))
    items = ids.shape[0] * -(-width // block) if width else 0
    if items and out_features:
        kernel("embedding:embedding_kernel", ids.device)[(min(_chip(ids).vector_cores, items),)](
            ids.contiguous(),
            weight.codes,
            weight.scales,
            weight.mins,
            weight.g_idx,
            None if weight.x_perm is None else weight.x_perm.contiguous(),
            out,
            weight.codes.stride(0),
            0 if weight.scales is None else weight.scales.stride(0),
            ids.shape[0],
            out_features,
            inn,
            weight.group_size,
            weight.group_offset,
            BITS=weight.bits,
            BLOCK=block,
        )
    return out


def _rows(x: Tensor) -> Tensor:
    """(..., n) as (rows, n) with consecutive columns."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty((0, x.shape[-1]))
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _power(n: int) -> int:
    """The power of 2 that holds n, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def _chip(t: Tensor) -> Chip:
    return chip_of(t.device)
