"""Blocks of ggml's quantized types, as `PackedWeight`s with the same values.

A type's decoder splits the bytes of blocks (n, block bytes) into integers q and, per group of them, a scale
and possibly a minimum: ``w = scale * q + min``. The results equal `gguf.quants.dequantize` in float32. The
nibbles of Q4_0 and Q4_1 are `packed`'s own and are copied as they are.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..quant import packed
from ..spec import PackedWeight

Bytes = NDArray[np.uint8]
_DENSE = {
    "F32": (np.float32, torch.float32),
    "F16": (np.float16, torch.float16),
    "BF16": (np.int16, torch.bfloat16),
}
_NIBBLES = np.array([0, 4], np.uint8)


class Decoded(NamedTuple):
    """Blocks taken apart; n blocks of v values in g groups."""

    codes: NDArray[np.uint8] | NDArray[np.int8]  # (n, v) int8, or (n, v / 2) of `packed`'s nibbles
    scales: NDArray[np.float32] | NDArray[np.float16]  # (n, g)
    mins: NDArray[np.float32] | NDArray[np.float16] | None  # (n, g)


class _Type(NamedTuple):
    decode: Callable[[Bytes], Decoded]
    bits: int  # 4 or 8: the layout in memory
    group: int


def is_dense(kind: str) -> bool:
    return kind in _DENSE


def readable(kind: str) -> bool:
    """Whether `unpack` can take the type: natively, or through the gguf library's dequantization."""
    if kind in _DENSE or kind in _TYPES:
        return True
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[kind]
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def unpack(kind: str, raw: Bytes, block_bytes: int) -> PackedWeight:
    """The matrix in rows of blocks ``raw`` (out, bytes of a row), contiguous and owned by the caller."""
    if kind in _DENSE:
        stored, dtype = _DENSE[kind]
        return packed.dense(torch.from_numpy(raw.view(stored)).view(dtype))
    out, blocks = raw.shape[0], raw.shape[1] // block_bytes
    # A hostile scale may be infinite or no number; then so are the weights, without a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        if kind not in _TYPES:
            return packed.dense(torch.from_numpy(_through_library(kind, raw, blocks)))
        parts = _TYPES[kind].decode(raw.reshape(-1, block_bytes))
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(part).reshape(out, blocks * part.shape[1]))
        for name, part in parts._asdict().items()
        if part is not None
    }
    bits, group = _TYPES[kind].bits, _TYPES[kind].group
    columns = tensors["codes"].shape[1] * (8 // bits)
    return packed.check(PackedWeight(f"int{bits}", (out, columns), tensors, group))


def _through_library(kind: str, raw: Bytes, blocks: int) -> NDArray[np.float32]:
    """The values (out, in) of a type that has no form in memory but float32."""
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[kind]
    if raw.size == 0:  # which the library cannot take
        return np.zeros((raw.shape[0], blocks * GGML_QUANT_SIZES[number][0]), np.float32)
    return np.ascontiguousarray(quants.dequantize(raw, number), np.float32)


def _half(raw: Bytes) -> NDArray[np.float16]:
    """float16 numbers out of (n, 2 k) bytes."""
    return np.ascontiguousarray(raw).view(np.float16)


def _low_high(raw: Bytes) -> Bytes:
    """(n, k) bytes as (n, 2, k): the low nibbles, then the high ones."""
    return (raw[:, None, :] >> _NIBBLES[None, :, None]) & np.uint8(15)


def _nibbles(q: Bytes) -> Bytes:
    """(n, 256) values of four bits as (n, 128) codes: of each 32, j low and j + 16 high in a byte."""
    pairs = q.reshape(len(q), 8, 2, 16)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << np.uint8(4))).reshape(len(q), 128)


def _fifth_bits(raw: Bytes) -> Bytes:
    """(n, 4) bytes as (n, 32) bits, moved to weight 16."""
    return np.unpackbits(raw, axis=-1, bitorder="little") << np.uint8(4)


def _q4_0(b: Bytes) -> Decoded:
    d = _half(b[:, :2])
    mins = d * np.float16(-8)  # a power of two: exact, unless it overflows
    if not np.isfinite(mins).all():
        d32 = d.astype(np.float32)
        return Decoded(b[:, 2:], d32, d32 * np.float32(-8))
    return Decoded(b[:, 2:], d, mins)


def _q4_1(b: Bytes) -> Decoded:
    return Decoded(b[:, 4:], _half(b[:, :2]), _half(b[:, 2:4]))


def _q5_0(b: Bytes) -> Decoded:
    q = _low_high(b[:, 6:]).reshape(len(b), 32) | _fifth_bits(b[:, 2:6])
    return Decoded(q.view(np.int8) - np.int8(16), _half(b[:, :2]), None)


def _q5_1(b: Bytes) -> Decoded:
    q = _low_high(b[:, 8:]).reshape(len(b), 32) | _fifth_bits(b[:, 4:8])
    return Decoded(q.view(np.int8), _half(b[:, :2]), _half(b[:, 2:4]))


def _q8_0(b: Bytes) -> Decoded:
    return Decoded(np.ascontiguousarray(b[:, 2:]).view(np.int8), _half(b[:, :2]), None)


def _pairs_of_bits(raw: Bytes) -> Bytes:
    """(n, 64) bytes as (n, 256) numbers of two bits: of each 32 bytes first all low pairs, and so on."""
    shifts = np.array([0, 2, 4, 6], np.uint8)
    parts = (raw.reshape(len(raw), 2, 1, 32) >> shifts[None, None, :, None]) & np.uint8(3)
    return parts.reshape(len(raw), 256)


def _q2_k(b: Bytes) -> Decoded:
    scales, d, dmin = b[:, :16], _half(b[:, 80:82]).astype(np.float32), _half(b[:, 82:84]).astype(np.float32)
    codes = _nibbles(_pairs_of_bits(b[:, 16:80]))
    return Decoded(codes, d * (scales & 15).astype(np.float32), -(dmin * (scales >> 4)))


def _q3_k(b: Bytes) -> Decoded:
    high, low, packed_scales, d = (
        b[:, :32],
        b[:, 32:96],
        b[:, 96:108],
        _half(b[:, 108:110]).astype(np.float32),
    )
    # Sixteen scales of six bits: the low four as nibbles of 8 bytes, the high two as bit pairs of 4 bytes.
    upper = (packed_scales[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8)[None, :, None]) & np.uint8(3)
    scales = _low_high(packed_scales[:, :8]).reshape(len(b), 16) | (upper.reshape(len(b), 16) << np.uint8(4))
    # A set bit of the mask means: do not subtract 4.
    bits = (high[:, None, :] >> np.arange(8, dtype=np.uint8)[None, :, None]) & np.uint8(1)
    q = _pairs_of_bits(low).view(np.int8) - ((bits ^ np.uint8(1)).reshape(len(b), 256) << np.uint8(2)).view(
        np.int8
    )
    return Decoded(q, d * (scales.view(np.int8) - np.int8(32)).astype(np.float32), None)


def _scales_and_mins(b: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of Q4_K and Q5_K: eight scales and eight minimums of six bits in 12 bytes, times d and -dmin."""
    d, dmin = _half(b[:, :2]).astype(np.float32), _half(b[:, 2:4]).astype(np.float32)
    first, second, rest = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([first & 63, (rest & 15) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (rest >> 4) | ((second >> 2) & 48)], axis=1)
    return d * scales.astype(np.float32), -(dmin * mins.astype(np.float32))


def _q4_k(b: Bytes) -> Decoded:
    # Of each 32 bytes, the low nibbles are 32 values and the high ones the next 32.
    first, second = np.split(b[:, 16:].reshape(len(b), 4, 32), 2, axis=2)
    low = (first & np.uint8(15)) | (second << np.uint8(4))
    high = (first >> np.uint8(4)) | (second & np.uint8(240))
    return Decoded(np.stack([low, high], axis=2).reshape(len(b), 128), *_scales_and_mins(b))


def _q5_k(b: Bytes) -> Decoded:
    bits = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & np.uint8(1)
    q = _low_high(b[:, 48:].reshape(-1, 32)).reshape(len(b), 256) | (bits.reshape(len(b), 256) << np.uint8(4))
    return Decoded(q.view(np.int8), *_scales_and_mins(b))


def _q6_k(b: Bytes) -> Decoded:
    low, high = b[:, :128], b[:, 128:192]
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    q = _low_high(low.reshape(-1, 64)).reshape(len(b), 256) | (_pairs_of_bits(high) << np.uint8(4))
    return Decoded(q.view(np.int8) - np.int8(32), _half(b[:, 208:]).astype(np.float32) * scales, None)


_TYPES = {
    "Q4_0": _Type(_q4_0, 4, 32),
    "Q4_1": _Type(_q4_1, 4, 32),
    "Q5_0": _Type(_q5_0, 8, 32),
    "Q5_1": _Type(_q5_1, 8, 32),
    "Q8_0": _Type(_q8_0, 8, 32),
    "Q2_K": _Type(_q2_k, 4, 16),
    "Q3_K": _Type(_q3_k, 8, 16),
    "Q4_K": _Type(_q4_k, 4, 32),
    "Q5_K": _Type(_q5_k, 8, 32),
    "Q6_K": _Type(_q6_k, 8, 16),
}
