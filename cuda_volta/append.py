"""New keys and values into a KV cache, keys rotated on the way."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .checks import expect, expect_device, expect_half
from .rotary import RotaryTable, rotary_table
from .runtime import load
from .variant import Variant

APPEND = Variant("append", "append.cu", "append", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (APPEND,)
_SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class NewRows(ctypes.Structure):
    """``struct NewRows`` of append.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "cache", "scale")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_head", "cache_page", "cache_row", "cache_head")),
        ("head_dim", ctypes.c_int32),
    ]


class AppendParams(ctypes.Structure):
    """``struct AppendParams`` of append.cu."""

    _fields_ = [
        ("k", NewRows),
        ("v", NewRows),
        ("slots", ctypes.c_void_p),
        ("table", RotaryTable),
        *((name, ctypes.c_int32) for name in ("num_slots", "page", "heads")),
    ]


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
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes ``k`` (N, Hkv, D) and ``v`` (N, Hkv, Dv) into caches (P, page, Hkv, D | Dv) in place, float16.

    Row n goes to slot ``slots[n]`` (int64) of P * page; a slot outside the cache is skipped. With ``cos``,
    ``sin`` and ``positions`` keys are rotated first (`rotary`). ``k_scale`` and ``v_scale`` float32 (Hkv,)
    divide what is stored. Raises ValueError for what the kernel cannot take, before anything is written.
    """
    tensors = [slots]
    expect("slots", slots, (-1,), torch.int64)
    expect_half("k_cache", k_cache)
    expect("k_cache", k_cache, (-1,) * 4, torch.float16)
    pages, page, heads, _ = k_cache.shape
    if pages * page >= 1 << 31:
        raise ValueError(f"k_cache: {tuple(k_cache.shape)}, expected fewer than 2^31 slots")
    p = AppendParams(page=page, heads=heads, num_slots=pages * page)
    for name, cache, new, scale in (("k", k_cache, k, k_scale), ("v", v_cache, v, v_scale)):
        expect_half(name, new)
        expect_half(f"{name}_cache", cache)
        expect_device(k_cache, **{name: new, f"{name}_cache": cache, f"{name}_scale": scale}, slots=slots)
        expect(f"{name}_cache", cache, (*k_cache.shape[:3], -1), torch.float16)
        expect(name, new, (slots.shape[0], *cache.shape[2:]), torch.float16)
        rows = NewRows(
            new.data_ptr(), cache.data_ptr(), None, *new.stride()[:2], *cache.stride()[:3], new.shape[2]
        )
        if scale is not None:
            expect(f"{name}_scale", scale, (new.shape[1],), *_SCALES)
            tensors.append(scale.float().contiguous())
            rows.scale = tensors[-1].data_ptr()
        setattr(p, name, rows)
    if cos is not None and sin is not None and positions is not None:
        p.table, used = rotary_table(k, cos, sin, positions, interleaved)
        tensors += used
    if not slots.numel() or not p.num_slots:
        return
    slots = slots.contiguous()
    p.slots = slots.data_ptr()
    reads = (k, v, slots, *tensors)
    load(APPEND, k.device).launch((slots.shape[0], 1, 1), p, reads=reads, writes=(k_cache, v_cache))
