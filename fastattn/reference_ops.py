"""The oracles of every op but attention: float64 or exact integers, written from the definitions.

They share no code with the backends. Each function takes the op's record; floats come back in float64.
`OPS` wraps them as a backend, rounded once to the dtype that the op promises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference_mx
from .spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    Op,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)


# ------------------------------------------------------------------------------- rotary and KV append
def rotary(a: RotaryArgs) -> Tensor:
    """Each pair of ``x`` (N, heads, D) as a complex number, times ``cos + i sin``; float64."""
    for position in a.positions.tolist():
        if not 0 <= position < a.cos.shape[0]:
            raise ValueError(f"positions: {position}, expected 0..{a.cos.shape[0] - 1}")
    half = a.cos.shape[1]
    i = torch.arange(half, device=a.x.device)
    first, second = (2 * i, 2 * i + 1) if a.interleaved else (i, i + half)
    x = a.x.double()
    turned = torch.complex(x[..., first], x[..., second])
    turned = turned * torch.complex(a.cos.double(), a.sin.double())[a.positions, None]
    out = x.clone()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def append_kv(a: AppendKvArgs) -> tuple[Tensor, Tensor]:
    """Float64 copies of both caches after the writes; later rows win."""
    k = a.k.double()
    if a.cos is not None and a.sin is not None and a.positions is not None:
        k = rotary(RotaryArgs(a.k, a.cos, a.sin, a.positions, a.interleaved))
    out = []
    for cache_, new, scale in ((a.k_cache, k, a.k_scale), (a.v_cache, a.v.double(), a.v_scale)):
        slots = cache_.shape[0] * cache_.shape[1]
        flat = cache_.double().reshape(slots, *cache_.shape[2:]).clone()
        for row, slot in zip(new, a.slots.tolist(), strict=True):
            if slot >= slots:
                raise ValueError(f"slots: {slot}, expected below {slots}")
            if slot >= 0:
                flat[slot] = row if scale is None else row / scale.double()[:, None]
        out.append(flat.reshape(cache_.shape))
    return out[0], out[1]


# ----------------------------------------------------------------------------------------- norm, gate
def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """``weight * s / sqrt(mean(s^2) + eps)`` in float64, and s itself in x's dtype."""
    s = a.x if a.residual is None else (a.x.float() + a.residual.float()).to(a.x.dtype)
    wide = s.double()
    root = torch.sqrt((wide * wide).sum(-1, keepdim=True) / a.x.shape[-1] + a.eps)
    return a.weight.double() * wide / root, s if a.residual is not None else a.x.new_empty(0)


def swiglu(a: SwigluArgs) -> Tensor:
    """``g / (1 + exp(-g)) * u`` in float64."""
    half = a.x.shape[-1] // 2
    g, u = a.x[..., :half].double(), a.x[..., half:].double()
    return g / (1 + torch.exp(-g)) * u


# --------------------------------------------------------------------------------------------- linear
def matrix(w: PackedWeight) -> Tensor:
    """W (out, in) in float64, each value as the layout says."""
    if w.format == "dense":
        stored = w.tensors["weight"].double()
    else:
        column = torch.arange(w.shape[1])
        codes = w.tensors["codes"].to(torch.int64)
        if w.format == "int4":
            place = column % 32
            byte = codes[:, column // 32 * 16 + place % 16]
            codes = torch.where(place < 16, byte % 16, byte.div(16, rounding_mode="floor"))
        group = (column + w.group_offset) // w.group_size if w.g_idx is None else w.g_idx.long()
        stored = codes * w.tensors["scales"].double()[:, group]
        if "mins" in w.tensors:
            stored = stored + w.tensors["mins"].double()[:, group]
    if w.x_perm is None:
        return stored
    result = torch.empty_like(stored)
    for c, place in enumerate(w.x_perm.tolist()):
        result[:, place] = stored[:, c]
    return result


def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` in float64."""
    y = a.x.double() @ matrix(a.weight).T
    return y if a.weight.bias is None else y + a.weight.bias.double()


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W in float64."""
    return matrix(a.weight)[a.ids]


# ---------------------------------------------------------------------------------------- as a backend
def _append_in_place(a: AppendKvArgs) -> None:
    k, v = append_kv(a)
    a.k_cache.copy_(k)
    a.v_cache.copy_(v)


def _rounded(oracle: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    return lambda a: oracle(a).to(a.x.dtype)


def _rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    normed, total = rms_norm(a)
    return normed.to(a.x.dtype), total


OPS: dict[str, Op] = {
    "append_kv": Op(
        _append_in_place, frozenset({"cos", "sin", "positions", "interleaved", "k_scale", "v_scale"})
    ),
    "rotary": Op(_rounded(rotary), frozenset({"interleaved"})),
    "rms_norm": Op(_rms_norm, frozenset({"residual"})),
    "swiglu": Op(_rounded(swiglu)),
    "linear": Op(_rounded(linear), frozenset({"g_idx", "x_perm", "bias", "group_offset", "act"})),
    "embedding": Op(lambda a: embedding(a).to(a.dtype), frozenset({"g_idx", "x_perm"})),
    **reference_mx.OPS,
}
