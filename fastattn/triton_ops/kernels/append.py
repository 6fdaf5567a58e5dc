"""Writing new keys and values into the KV cache; keys are rotated on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotary import rotated


@triton.jit
def append_kernel(
    k_cache, v_cache, k, v, slots, cos, sin, positions, k_scale, v_scale,
    rows, heads, page, num_slots, max_position,
    k_page_stride, k_slot_stride, k_cache_head_stride, v_page_stride, v_slot_stride, v_cache_head_stride,
    k_stride, k_head_stride, v_stride, v_head_stride, slots_stride, positions_stride,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS heads a program, of ``rows`` in all tokens. Absent ``cos`` or scales are None.

    Slots outside the cache are skipped.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // heads, row % heads
    slot = tl.load(slots + token * slots_stride, row < rows, -1)
    valid = (slot >= 0) & (slot < num_slots)

    column = tl.arange(0, WIDTH)[None, :]
    source = k + token * k_stride + head * k_head_stride
    if cos is not None:
        position = tl.load(positions + token * positions_stride, valid, 0)
        new_k = rotated(
            source, valid, cos, sin, position, max_position, HEAD_DIM, HALF, INTERLEAVED, WIDTH
        ).to(k.dtype.element_ty)  # fmt: skip
    else:
        new_k = tl.load(source + column, valid & (column < HEAD_DIM), 0.0)
    if k_scale is not None:
        new_k = tl.div_rn(new_k.to(tl.float32), tl.load(k_scale + head))
    at = k_cache + slot // page * k_page_stride + slot % page * k_slot_stride + head * k_cache_head_stride
    tl.store(at + column, new_k.to(k_cache.dtype.element_ty), valid & (column < HEAD_DIM))

    column = tl.arange(0, V_WIDTH)[None, :]
    source = v + token * v_stride + head * v_head_stride
    new_v = tl.load(source + column, valid & (column < V_HEAD_DIM), 0.0)
    if v_scale is not None:
        new_v = tl.div_rn(new_v.to(tl.float32), tl.load(v_scale + head))
    at = v_cache + slot // page * v_page_stride + slot % page * v_slot_stride + head * v_cache_head_stride
    tl.store(at + column, new_v.to(v_cache.dtype.element_ty), valid & (column < V_HEAD_DIM))
