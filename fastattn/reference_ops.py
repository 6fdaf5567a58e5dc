"""The oracles of every op but attention: float64 or exact integers, written from the definitions.

They share no code with the backends. Each function takes the op's record; floats come back in float64.
`OPS` wraps them as a backend, rounded once to the dtype that the op promises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    MxPackArgs,
    MxUnpackArgs,
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


# ------------------------------------------------------------------------------------------------- MX
# Sign, exponent and mantissa bits, bias, emax, and codes that are no number (OCP MX v1.0, section 5.3).
_FLOATS = {
    "e2m1": (2, 1, 1, 2, ()),
    "e2m3": (2, 3, 1, 2, ()),
    "e3m2": (3, 2, 3, 4, ()),
    "e4m3": (4, 3, 7, 8, (0x7F,)),
    "e5m2": (5, 2, 15, 15, (0x7C, 0x7D, 0x7E, 0x7F)),
}


@cache
def mx_values(element: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, values) of every non-negative number of an element format, ascending."""
    if element == "int8":
        codes = np.arange(128)
        return codes, codes / 64.0
    exponent_bits, mantissa_bits, bias, _, excluded = _FLOATS[element]
    pairs = []
    for e, m in product(range(2**exponent_bits), range(2**mantissa_bits)):
        code = e * 2**mantissa_bits + m
        fraction = m / 2**mantissa_bits
        value = 2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction)
        if code not in excluded:
            pairs.append((code, value))
    return np.array([code for code, _ in pairs]), np.array([value for _, value in pairs])


def mx_scale_exponents(amax: np.ndarray, element: str, scale: str) -> np.ndarray:
    """Exponent of each block's scale, before it becomes a biased byte; ``amax`` is finite."""
    emax = 0 if element == "int8" else _FLOATS[element][3]
    mantissa_bits = 6 if element == "int8" else _FLOATS[element][1]
    fraction, power = np.frexp(amax)  # amax = fraction * 2^power, fraction in [1/2, 1)
    exponent = power.astype(np.int64) - 1 - emax
    if scale == "even":
        steps = np.rint(np.ldexp(fraction, mantissa_bits + 1))  # numpy rounds ties to even
        exponent += steps == 2 ** (mantissa_bits + 1)
    elif scale == "ceil":
        largest = mx_values(element)[1][-1]
        exponent -= 2
        for _ in range(4):
            exponent += np.ldexp(largest, exponent) < amax
    return np.where(amax == 0, -127, exponent.clip(-127, 127))


def mx_round(scaled: np.ndarray, element: str) -> np.ndarray:
    """Codes of finite float64 values: the nearest of the table, ties to the even code, saturating."""
    codes, values = mx_values(element)
    size = np.abs(scaled)
    above = np.searchsorted(values, size).clip(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    to_low, to_high = size - low, high - size
    tie_low = (to_low == to_high) & (codes[above - 1] % 2 == 0)
    chosen = np.where((to_low < to_high) | tie_low, codes[above - 1], codes[above])
    negative = np.signbit(scaled)
    if element == "int8":
        return np.where(negative, -chosen, chosen) % 256
    exponent_bits, mantissa_bits = _FLOATS[element][:2]
    return chosen + np.where(negative, 2 ** (exponent_bits + mantissa_bits), 0)


def _mx_bits(element: str) -> int:
    return 8 if element == "int8" else 1 + sum(_FLOATS[element][:2])


def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) as the specification defines them."""
    bits, n, lead = _mx_bits(a.element), a.x.shape[-1], a.x.shape[:-1]
    rows, blocks = lead.numel(), -(-n // a.block)
    padded = np.zeros((rows, blocks * a.block))
    padded[:, :n] = a.x.double().reshape(rows, n).numpy()
    blocked = padded.reshape(rows, blocks, a.block)
    finite = np.asarray(np.isfinite(blocked).all(axis=-1))[..., None]
    x = np.where(finite, blocked, 0.0)
    exponents = mx_scale_exponents(np.abs(x).max(-1, initial=0.0), a.element, a.scale)
    scales = np.where(finite[..., 0], exponents + 127, 255).astype(np.uint8)
    numbers = mx_round(np.ldexp(x, -exponents[..., None]), a.element) * finite
    stream = (numbers.reshape(rows, blocks * a.block)[:, :n, None] >> np.arange(bits)) & 1
    codes = np.packbits(stream.astype(np.uint8).reshape(rows, n * bits), axis=1, bitorder="little")
    return torch.from_numpy(codes).reshape(*lead, codes.shape[1]), torch.from_numpy(scales).reshape(
        *lead, blocks
    )


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n) in float64."""
    bits = _mx_bits(a.element)
    table = np.full(2**bits, np.nan)
    codes, values = mx_values(a.element)
    table[codes] = values
    if a.element == "int8":
        table[128:] = np.arange(-128, 0) / 64.0
    else:
        table[codes + 2 ** (bits - 1)] = -values
    if a.element == "e5m2":
        table[[0x7C, 0xFC]] = np.inf, -np.inf
    lead = a.codes.shape[:-1]
    data, scales = (t.reshape(lead.numel(), t.shape[-1]).numpy() for t in (a.codes, a.scales))
    stream = np.unpackbits(data, axis=1, bitorder="little", count=a.n * bits)
    index = (stream.reshape(lead.numel(), a.n, bits).astype(np.int64) << np.arange(bits)).sum(-1)
    power = np.repeat(scales.astype(np.int64), a.block, axis=1)[:, : a.n]
    out = np.where(power == 255, np.nan, np.ldexp(table[index], power - 127))
    return torch.from_numpy(out).reshape(*lead, a.n)


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
    "mx_pack": Op(mx_pack, frozenset({"even", "ceil"})),
    "mx_unpack": Op(lambda a: mx_unpack(a).to(a.dtype)),
}
