"""Writing new keys and values into the KV cache; keys are rotated on the way."""

from __future__ import annotations

from triton import cdiv, next_power_of_2

from ..spec import AppendKvArgs
from . import launch
from .kernels.append import append_kernel
from .launch import Launch
from .rotary import heads_of_a_program


def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the caches in place. Slots outside the cache are skipped.

    Raises ValueError unless the caches' last dimensions are contiguous: a copy would not be the cache.
    """
    pages, page, heads, head_dim = a.k_cache.shape
    v_head_dim = a.v_cache.shape[-1]
    for name, cache in (("k_cache", a.k_cache), ("v_cache", a.v_cache)):
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise ValueError(f"{name}: stride {cache.stride(-1)} of its last dimension, expected 1")
    if not a.slots.numel() or not pages * page * heads:
        return
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (a.k, a.v))
    cos, sin, k_scale, v_scale = (
        None if t is None else t.contiguous() for t in (a.cos, a.sin, a.k_scale, a.v_scale)
    )
    width, v_width = next_power_of_2(head_dim), next_power_of_2(v_head_dim)
    group, rows = heads_of_a_program(max(width, v_width)), a.slots.shape[0] * heads
    table, half = (1, 0) if cos is None else cos.shape
    args = (
        a.k_cache, a.v_cache, k, v, a.slots, cos, sin, a.positions, k_scale, v_scale,
        rows, heads, page, pages * page, table, *a.k_cache.stride()[:3], *a.v_cache.stride()[:3],
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), a.slots.stride(0),
        0 if a.positions is None else a.positions.stride(0),
    )  # fmt: skip
    constants = (head_dim, v_head_dim, half, a.interleaved, group, width, v_width)
    launch.run([Launch(append_kernel, cdiv(rows, group), args, constants, 4, 1)], a.slots.device)
