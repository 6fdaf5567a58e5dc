"""New keys and values into a KV cache, keys rotated on the way."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .checks import expect_device, expect_half
from .rotary import RotaryTable, rotary_table
from .runtime import load
from .variant import Variant

APPEND = Variant("append", "append.cu", "append", (), threads=256, min_blocks=4, shared_bytes=0)
VARIANTS = (APPEND,)


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
    if k_cache.shape[0] * k_cache.shape[1] >= 1 << 31:
        raise ValueError(f"k_cache: {tuple(k_cache.shape)}, expected fewer than 2^31 slots")
    p = AppendParams(page=k_cache.shape[1], heads=k.shape[1], num_slots=k_cache.shape[0] * k_cache.shape[1])
    for name, cache, new, scale in (("k", k_cache, k, k_scale), ("v", v_cache, v, v_scale)):
        expect_half(name, new)
        expect_half(f"{name}_cache", cache)
        expect_device(k_cache, **{name: new, f"{name}_cache": cache, f"{name}_scale": scale}, slots=slots)
        if cache.ndim != 4 or new.shape != (slots.shape[0], *cache.shape[2:]):
            raise ValueError(
                f"{name}: {tuple(new.shape)}, expected ({slots.shape[0]}, {tuple(cache.shape[2:])})"
            )
        rows = NewRows(
            new.data_ptr(), cache.data_ptr(), None, *new.stride()[:2], *cache.stride()[:3], new.shape[2]
        )
        if scale is not None:
            if tuple(scale.shape) != (new.shape[1],):
                raise ValueError(f"{name}_scale: {tuple(scale.shape)}, expected ({new.shape[1]},)")
            tensors.append(scale.float().contiguous())
            rows.scale = tensors[-1].data_ptr()
        setattr(p, name, rows)
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"v_cache: {tuple(v_cache.shape)}, k_cache is {tuple(k_cache.shape)}")
    if slots.dtype != torch.int64:
        raise ValueError(f"slots: {slots.dtype}, expected int64")
    if cos is not None and sin is not None and positions is not None:
        p.table, used = rotary_table(k, cos, sin, positions, interleaved)
        tensors += used
    if not slots.numel() or not p.num_slots:
        return
    slots = slots.contiguous()
    p.slots = slots.data_ptr()
    reads = (k, v, slots, *tensors)
    load(APPEND, k.device).launch((slots.shape[0], 1, 1), p, reads=reads, writes=(k_cache, v_cache))
