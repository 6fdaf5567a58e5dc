"""The oracles of formats of few bits and of messages, written from their definitions (quant/mx.py).

They share no code with the backends: tables of values, numpy's exact float64 and, where the definition says
so, single float32 operations.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from .spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, Op

# Exponent and mantissa bits, bias, emax, and codes that are no number (OCP MX v1.0, section 5.3; E1M1 and
# E2M2 by the same rules).
_FLOATS: dict[str, tuple[int, int, int, int, tuple[int, ...]]] = {
    "e1m1": (1, 1, 0, 1, ()),
    "e2m1": (2, 1, 1, 2, ()),
    "e2m2": (2, 2, 1, 2, ()),
    "e2m3": (2, 3, 1, 2, ()),
    "e3m2": (3, 2, 3, 4, ()),
    "e4m3": (4, 3, 7, 8, (0x7F,)),
    "e5m2": (5, 2, 15, 15, (0x7C, 0x7D, 0x7E, 0x7F)),
}
_INTEGERS = {"int4": (4, 2), "int8": (8, 6)}  # bits, fraction bits
_TOP = {"e4m3": 7, "fp16": 14}
_POWERS, _MULTIPLIERS = (1.0, 2.0, 0.5), (1.0, 0.9375, 0.875, 1.0625, 1.125, 1.5)


# ------------------------------------------------------------------------------------------- elements
def mx_bits(element: str) -> int:
    """Bits of a code."""
    return _INTEGERS[element][0] if element in _INTEGERS else 1 + sum(_FLOATS[element][:2])


@cache
def mx_values(element: str) -> tuple[np.ndarray, np.ndarray]:
    """(codes, values) of every non-negative number of an element format, ascending."""
    if element in _INTEGERS:
        bits, fraction_bits = _INTEGERS[element]
        codes = np.arange(2 ** (bits - 1))
        return codes, codes / 2.0**fraction_bits
    exponent_bits, mantissa_bits, bias, _, excluded = _FLOATS[element]
    pairs = []
    for e, m in product(range(2**exponent_bits), range(2**mantissa_bits)):
        code = e * 2**mantissa_bits + m
        fraction = m / 2**mantissa_bits
        value = 2.0 ** (1 - bias) * fraction if e == 0 else 2.0 ** (e - bias) * (1 + fraction)
        if code not in excluded:
            pairs.append((code, value))
    return np.array([code for code, _ in pairs]), np.array([value for _, value in pairs])


@cache
def mx_table(element: str) -> np.ndarray:
    """The value of every code, NaN and infinities included."""
    bits = mx_bits(element)
    table = np.full(2**bits, np.nan)
    codes, values = mx_values(element)
    table[codes] = values
    if element in _INTEGERS:
        half = 2 ** (bits - 1)
        table[half:] = np.arange(-half, 0) / 2.0 ** _INTEGERS[element][1]
    else:
        table[codes + 2 ** (bits - 1)] = -values
    if element == "e5m2":
        table[[0x7C, 0xFC]] = np.inf, -np.inf
    return table


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
    bits = mx_bits(element)
    if element in _INTEGERS:
        return np.where(negative, -chosen, chosen) % 2**bits
    return chosen + np.where(negative, 2 ** (bits - 1), 0)


# --------------------------------------------------------------------------------------------- scales
def mx_scale_exponents(amax: np.ndarray, element: str, scale: str) -> np.ndarray:
    """Exponent of each block's E8M0 scale, before it becomes a biased byte; ``amax`` is finite."""
    emax = 0 if element in _INTEGERS else _FLOATS[element][3]
    mantissa_bits = _INTEGERS[element][1] if element in _INTEGERS else _FLOATS[element][1]
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


def _row_exponents(amax: np.ndarray, element: str, scale: str) -> np.ndarray:
    """k of each row (rows, 1), of the largest magnitudes of its blocks (rows, blocks)."""
    row = amax.max(-1, keepdims=True, initial=0.0)
    emax = 0 if element in _INTEGERS else _FLOATS[element][3]
    power = np.frexp(row)[1].astype(np.int64)
    return np.where(row == 0, -127, (power - 1 - emax - _TOP[scale]).clip(-127, 127))


def _errors(scaled: np.ndarray, codes: np.ndarray, element: str) -> np.ndarray:
    """Sum over each block of the squared errors, in the units of quant.mx.ERROR_STEPS."""
    values = mx_values(element)[1]
    unit = (values[-1] - values[-2]) / 32
    rounded = np.abs(mx_table(element)[codes]).astype(np.float32)
    error = np.abs(rounded - np.abs(scaled.astype(np.float32))).astype(np.float64)
    return (np.minimum(np.rint(error / unit), 127) ** 2).sum(-1)


def _choose(costs: list[np.ndarray], choices: list[np.ndarray]) -> np.ndarray:
    """Of each block the choice with the least cost, the first of equals."""
    best = np.argmin(np.stack(costs), axis=0)
    return np.take_along_axis(np.stack(choices), best[None], 0)[0]


def _power_blocks(x: np.ndarray, a: MxPackArgs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale bytes (rows, blocks, 1), no head (rows, 0)) of finite blocks (rows, blocks, block)."""
    first = mx_scale_exponents(np.abs(x).max(-1, initial=0.0), a.element, a.scale)
    exponents = first
    if a.search:
        choices = [(first + int(np.log2(p))).clip(-127, 127) for p in _POWERS]
        scaled = [np.ldexp(x, -e[..., None]) for e in choices]
        sums = [_errors(v, mx_round(v, a.element), a.element) for v in scaled]
        costs = [
            s.astype(np.float32) * np.ldexp(1.0, 2 * (e - first)) for s, e in zip(sums, choices, strict=True)
        ]
        exponents = _choose(costs, choices)
    codes = mx_round(np.ldexp(x, -exponents[..., None]), a.element)
    return codes, (exponents + 127)[..., None], np.zeros((len(x), 0), np.int64)


def _fine_blocks(x: np.ndarray, a: MxPackArgs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes, scale bytes (rows, blocks, 1 or 2), the rows' bytes (rows, 1)) of finite blocks."""
    amax = np.abs(x).max(-1, initial=0.0)
    k = _row_exponents(amax, a.element, a.scale)
    largest, inside = np.ldexp(amax, -k).astype(np.float32), np.ldexp(x, -k[..., None])
    choices, scaled, costs = [], [], []
    for multiplier in _MULTIPLIERS if a.search else (1.0,):
        wanted = (largest * np.float32(multiplier / mx_values(a.element)[1][-1])).astype(np.float64)
        s = mx_table("e4m3")[mx_round(wanted, "e4m3")] if a.scale == "e4m3" else wanted.astype(np.float16)
        s = np.asarray(s, np.float32)
        inverse = np.divide(np.float32(1), s, out=np.zeros_like(s), where=s > 0).astype(np.float64)
        choices.append(s)
        scaled.append((inside * inverse[..., None]).astype(np.float32).astype(np.float64))
        sums = _errors(scaled[-1], mx_round(scaled[-1], a.element), a.element).astype(np.float32)
        costs.append(sums * (s * s))
    best = np.argmin(np.stack(costs), axis=0)[None]
    chosen = np.take_along_axis(np.stack(scaled), best[..., None], 0)[0]
    s = np.take_along_axis(np.stack(choices), best, 0)[0].astype(np.float64)
    if a.scale == "e4m3":
        scales = mx_round(s, "e4m3")[..., None]
    else:
        scales = s.astype(np.float16)[..., None].view(np.uint8).astype(np.int64)
    return mx_round(chosen, a.element), scales, k + 127


# ------------------------------------------------------------------------------------ pack and unpack
def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) as quant/mx.py defines them."""
    bits, n, lead = mx_bits(a.element), a.x.shape[-1], a.x.shape[:-1]
    rows, blocks = lead.numel(), -(-n // a.block)
    padded = np.zeros((rows, blocks * a.block))
    padded[:, :n] = a.x.double().reshape(rows, n).numpy()
    blocked = padded.reshape(rows, blocks, a.block)
    finite = np.asarray(np.isfinite(blocked).all(axis=-1))[..., None]
    x = np.where(finite, blocked, 0.0)
    numbers, scales, head = (_fine_blocks if a.scale in _TOP else _power_blocks)(x, a)
    nan = {"e4m3": [0x7F], "fp16": [0x00, 0x7E]}.get(a.scale, [0xFF])
    scales = np.where(finite, scales, nan).reshape(rows, blocks * len(nan))
    scales = np.concatenate((head, scales), axis=1).astype(np.uint8)
    numbers = (numbers * finite).reshape(rows, blocks * a.block)[:, :n, None]
    stream = ((numbers >> np.arange(bits)) & 1).astype(np.uint8).reshape(rows, n * bits)
    codes = np.packbits(stream, axis=1, bitorder="little")
    return tuple(torch.from_numpy(t).reshape(*lead, t.shape[1]) for t in (codes, scales))  # type: ignore[return-value]


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n) in float64."""
    bits, lead = mx_bits(a.element), a.codes.shape[:-1]
    data, scales = (t.reshape(lead.numel(), t.shape[-1]).numpy() for t in (a.codes, a.scales))
    stream = np.unpackbits(data, axis=1, bitorder="little", count=a.n * bits)
    index = (stream.reshape(lead.numel(), a.n, bits).astype(np.int64) << np.arange(bits)).sum(-1)
    power, s = scales.astype(np.int64), np.ones(1)
    if a.scale in _TOP:
        power, parts = power[:, :1], np.ascontiguousarray(scales[:, 1:])
        s = mx_table("e4m3")[parts] if a.scale == "e4m3" else parts.view("<f2").astype(np.float64)
        s = np.repeat(s, a.block, axis=1)[:, : a.n]
    else:
        power = np.repeat(power, a.block, axis=1)[:, : a.n]
    with np.errstate(invalid="ignore"):
        out = np.where(power == 255, np.nan, np.ldexp(mx_table(a.element)[index] * s, power - 127))
    return torch.from_numpy(out).reshape(*lead, a.n)


# ------------------------------------------------------------------------------------------- messages
def hadamard(length: int) -> np.ndarray:
    """Sylvester's matrix: entry (i, j) is -1 to the number of bits that i and j share."""
    i = np.arange(length)
    shared = i[:, None] & i
    parity = np.zeros_like(shared)
    while shared.any():
        parity, shared = parity ^ (shared & 1), shared >> 1
    return 1.0 - 2.0 * parity


def rotate(x: np.ndarray, length: int) -> np.ndarray:
    """Whole blocks of ``length`` columns, with the additions of quant/message.py."""
    x = x.astype(np.float32)
    whole = x.shape[1] // length * length if length else 0
    for start in range(0, whole, length or 1):
        block = x[:, start : start + length]
        for bit in range(length.bit_length() - 1):
            other = np.arange(length) ^ (1 << bit)
            low = (np.arange(length) & (1 << bit)) == 0
            block = np.where(low, block + block[:, other], block[:, other] - block)
        x[:, start : start + length] = block * np.float32(length**-0.5)
    return x


def encode(a: EncodeArgs) -> Tensor:
    """Codes, scales and outliers of all rows, one after another."""
    kept = [c for c in range(a.x.shape[1]) if c not in a.outliers]
    x = torch.from_numpy(rotate(a.x[:, kept].float().numpy(), a.rotate))
    codes, scales = mx_pack(MxPackArgs(x, a.element, a.block, a.scale, a.search))
    values = a.x[:, list(a.outliers)].bfloat16().contiguous().view(torch.uint8)
    return torch.cat((codes.flatten(), scales.flatten(), values.flatten()))


def decode_sum(a: DecodeSumArgs) -> Tensor:
    """The sum in float32, message by message; rotated back."""
    kept = [c for c in range(a.hidden) if c not in a.outliers]
    code_row = (len(kept) * mx_bits(a.element) + 7) // 8
    blocks = -(-len(kept) // a.block)
    scale_row = {"e4m3": 1 + blocks, "fp16": 1 + 2 * blocks}.get(a.scale, blocks)
    parts = []
    for m in a.messages:
        codes, scales, values = m.split([a.rows * code_row, a.rows * scale_row, 2 * a.rows * len(a.outliers)])
        shaped = MxUnpackArgs(
            codes.view(a.rows, code_row), scales.view(a.rows, scale_row), a.element, a.block, len(kept),
            torch.float32, a.scale,
        )  # fmt: skip
        exact = values.clone().view(torch.bfloat16).view(a.rows, len(a.outliers)).float()
        parts.append((mx_unpack(shaped).float(), exact))
    total, exact = parts[0]
    for values, channels in parts[1:]:
        total, exact = total + values, exact + channels
    out = torch.empty((a.rows, a.hidden), dtype=a.dtype) if a.out is None else a.out
    out[:, kept] = torch.from_numpy(rotate(total.numpy(), a.rotate)).to(a.dtype)
    out[:, list(a.outliers)] = exact.to(a.dtype)
    return out


_STORED = frozenset({"e4m3", "fp16"})  # scales of other bytes; the other names are roundings
_SCALES = frozenset({"even", "ceil"}) | _STORED
OPS: dict[str, Op] = {
    "mx_pack": Op(mx_pack, _SCALES | {"search"}),
    "mx_unpack": Op(lambda a: mx_unpack(a).to(a.dtype), _STORED),
    "encode": Op(encode, _SCALES | {"search", "rotate", "outliers"}),
    "decode_sum": Op(decode_sum, _STORED | {"rotate", "outliers"}),
}
