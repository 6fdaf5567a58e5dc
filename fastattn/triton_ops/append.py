"""Writing new keys and values into the KV cache; keys are rotated on the way."""

from __future__ import annotations

import triton
import triton.language as tl

from ..spec import AppendKvArgs
from .rotary import heads_of_a_program, rotated


@triton.jit
def _append(
    k_cache, v_cache, k, v, slots, cos, sin, positions, k_scale, v_scale,
    heads, page, num_slots, max_position,
    k_page_stride, k_slot_stride, k_cache_head_stride, v_page_stride, v_slot_stride, v_cache_head_stride,
    k_stride, k_head_stride, v_stride, v_head_stride, slots_stride, positions_stride,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROTATE: tl.constexpr, SCALE_K: tl.constexpr, SCALE_V: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    slot = tl.load(slots + row * slots_stride)
    valid = (slot >= 0) & (slot < num_slots)
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < HEAD_DIM)
    if ROTATE:
        position = tl.load(positions + row * positions_stride)
        new_k = rotated(
            k + row * k_stride, head, heads, cos, sin, position, max_position, k_head_stride,
            HEAD_DIM, HALF, INTERLEAVED, WIDTH,
        ).to(k.dtype.element_ty)  # fmt: skip
    else:
        new_k = tl.load(k + row * k_stride + head * k_head_stride + column, inside, 0.0)
    if SCALE_K:
        new_k = tl.div_rn(new_k.to(tl.float32), tl.load(k_scale + head, head < heads, 1.0))
    at = k_cache + slot // page * k_page_stride + slot % page * k_slot_stride + head * k_cache_head_stride
    tl.store(at + column, new_k.to(k_cache.dtype.element_ty), inside & valid)

    column = tl.arange(0, V_WIDTH)[None, :]
    inside = (head < heads) & (column < V_HEAD_DIM)
    new_v = tl.load(v + row * v_stride + head * v_head_stride + column, inside, 0.0)
    if SCALE_V:
        new_v = tl.div_rn(new_v.to(tl.float32), tl.load(v_scale + head, head < heads, 1.0))
    at = v_cache + slot // page * v_page_stride + slot % page * v_slot_stride + head * v_cache_head_stride
    tl.store(at + column, new_v.to(v_cache.dtype.element_ty), inside & valid)


def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the caches in place. Slots outside the cache are skipped."""
    pages, page, heads, head_dim = a.k_cache.shape
    v_head_dim = a.v_cache.shape[-1]
    if not a.slots.numel() or not pages * page * heads:
        return
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (a.k, a.v))
    width, v_width = triton.next_power_of_2(head_dim), triton.next_power_of_2(v_head_dim)
    group = heads_of_a_program(heads, max(width, v_width))
    rotate = a.cos is not None and a.sin is not None and a.positions is not None
    cos, sin = (a.cos.contiguous(), a.sin.contiguous()) if a.cos is not None and a.sin is not None else (k, k)
    positions = a.slots if a.positions is None else a.positions
    _append[(a.slots.shape[0], triton.cdiv(heads, group))](
        a.k_cache, a.v_cache, k, v, a.slots, cos, sin, positions,
        k if a.k_scale is None else a.k_scale.contiguous(), v if a.v_scale is None else a.v_scale.contiguous(),
        heads, page, pages * page, cos.shape[0],
        *a.k_cache.stride()[:3], *a.v_cache.stride()[:3],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), a.slots.stride(0), positions.stride(0),
        HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, HALF=cos.shape[1] if rotate else 0,
        INTERLEAVED=a.interleaved, ROTATE=rotate,
        SCALE_K=a.k_scale is not None, SCALE_V=a.v_scale is not None,
        HEADS=group, WIDTH=width, V_WIDTH=v_width,
    )  # fmt: skip
