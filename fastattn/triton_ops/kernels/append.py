"""Writing new keys and values into the KV cache; keys are rotated on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from .rotary import rotated


@triton.jit
def _store(cache, slot, page, page_stride, slot_stride, head_stride, head, column, value, inside):
    at = cache + slot // page * page_stride + slot % page * slot_stride + head * head_stride + column
    tl.store(at, value.to(cache.dtype.element_ty), inside)


@triton.jit
def append_kernel(
    k_cache, v_cache, k, v, slots, cos, sin, positions, k_scale, v_scale,
    heads, page, num_slots, max_position,
    k_page_stride, k_slot_stride, k_cache_head_stride, v_page_stride, v_slot_stride, v_cache_head_stride,
    k_stride, k_head_stride, v_stride, v_head_stride, slots_stride, positions_stride,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    """HEADS KV heads of one token a program. Absent ``cos`` or scales are None; slots outside are skipped."""
    pieces = tl.cdiv(heads, HEADS)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    head = tl.program_id(0) % pieces * HEADS + tl.arange(0, HEADS)[:, None]
    slot = tl.load(slots + row * slots_stride)
    valid = (slot >= 0) & (slot < num_slots) & (head < heads)

    column = tl.arange(0, WIDTH)[None, :]
    if cos is not None:
        position = tl.load(positions + row * positions_stride)
        new_k = rotated(
            k + row * k_stride, head, heads, cos, sin, position, max_position, k_head_stride,
            HEAD_DIM, HALF, INTERLEAVED, WIDTH,
        ).to(k.dtype.element_ty)  # fmt: skip
    else:
        new_k = tl.load(k + row * k_stride + head * k_head_stride + column, valid & (column < HEAD_DIM), 0.0)
    if k_scale is not None:
        new_k = tl.div_rn(new_k.to(tl.float32), tl.load(k_scale + head, head < heads, 1.0))
    _store(
        k_cache, slot, page, k_page_stride, k_slot_stride, k_cache_head_stride, head, column, new_k,
        valid & (column < HEAD_DIM),
    )  # fmt: skip

    column = tl.arange(0, V_WIDTH)[None, :]
    new_v = tl.load(v + row * v_stride + head * v_head_stride + column, valid & (column < V_HEAD_DIM), 0.0)
    if v_scale is not None:
        new_v = tl.div_rn(new_v.to(tl.float32), tl.load(v_scale + head, head < heads, 1.0))
    _store(
        v_cache, slot, page, v_page_stride, v_slot_stride, v_cache_head_stride, head, column, new_v,
        valid & (column < V_HEAD_DIM),
    )  # fmt: skip
