"""Integers of a few bits in 32-bit words: how GPTQ, AWQ and compressed-tensors store theirs.

Along one axis the values form a stream of bits, the lowest first: value i takes bits ``bits * i`` and up.
Three bits do not divide 32, so there 32 values share 3 words and some lie across two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Cut
from .cuts import spans_of

BITS = (2, 3, 4, 8)


def check_bits(bits: int) -> None:
    """Raises ValueError unless values of so many bits can be packed."""
    if bits not in BITS:
        raise ValueError(f"bits: {bits}, expected one of {', '.join(map(str, BITS))}")


def check_range(values: Tensor, bits: int, name: str) -> None:
    """Raises ValueError unless all ``values`` fit into so many bits."""
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < 1 << bits:
        found = f"{int(values.min())}..{int(values.max())}"
        raise ValueError(f"{name}: {found}, expected 0..{(1 << bits) - 1} with {bits} bits")


def num_words(n: int, bits: int) -> int:
    """Words that ``n`` values take."""
    return (n * bits + 31) // 32


def unit(bits: int) -> tuple[int, int]:
    """(values, words) of the smallest run of whole words that holds whole values."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def pack(values: Tensor, bits: int, axis: int) -> Tensor:
    """Packs integers 0..2^bits - 1 along ``axis`` of a matrix; int32, the last word padded with zeros."""
    check_bits(bits)
    check_range(values, bits, "values")
    lanes, words = unit(bits)
    n = values.shape[axis]
    rows = values.movedim(axis, 0)
    count = -(-n // lanes)
    padded = rows.new_zeros((count * lanes, rows.shape[1]), dtype=torch.int32)
    padded[:n] = rows
    out = padded.new_zeros((count, words, rows.shape[1]))
    for lane in range(lanes):
        value = padded[lane::lanes]
        word, shift = divmod(lane * bits, 32)
        out[:, word] |= value << shift
        if shift + bits > 32:
            out[:, word + 1] |= value >> (32 - shift)
    return out.flatten(0, 1)[: num_words(n, bits)].movedim(0, axis).contiguous()


def unpack(words: Tensor, bits: int, n: int, axis: int) -> Tensor:
    """The first ``n`` values along ``axis`` of an int32 matrix; uint8."""
    check_bits(bits)
    lanes, width = unit(bits)
    rows = words.movedim(axis, 0)
    count = -(-n // lanes)
    if rows.shape[0] < num_words(n, bits):
        raise ValueError(f"words: {rows.shape[0]}, {n} values of {bits} bits take {num_words(n, bits)}")
    if rows.shape[0] < count * width:
        rows = torch.cat((rows, rows.new_zeros((count * width - rows.shape[0], rows.shape[1]))))
    rows = rows[: count * width].unflatten(0, (count, width))
    out = rows.new_empty((count, lanes, rows.shape[2]), dtype=torch.uint8)
    mask = (1 << bits) - 1
    for lane in range(lanes):
        word, shift = divmod(lane * bits, 32)
        value = rows[:, word] >> shift  # its upper bits may be copies of the sign
        if shift + bits > 32:
            value = (value & ((1 << (32 - shift)) - 1)) | (rows[:, word + 1] << (32 - shift))
        out[:, lane] = value & mask
    return out.flatten(0, 1)[:n].movedim(0, axis)


def unpack_cut(words: Tensor, bits: int, cut: Cut, axis: int) -> Tensor:
    """The values that ``cut`` selects along ``axis``; touches only the words that hold them."""
    lanes, width = unit(bits)
    if cut.order is None:
        parts = []
        for lo, hi in spans_of(cut):
            first = lo // lanes
            piece = words.narrow(axis, first * width, num_words(hi, bits) - first * width if hi > lo else 0)
            values = unpack(piece, bits, hi - first * lanes if hi > lo else 0, axis)
            parts.append(values.narrow(axis, lo - first * lanes if hi > lo else 0, hi - lo))
        return parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    order = cut.order.long()
    units, place = torch.unique(order // lanes, return_inverse=True)
    index = (units[:, None] * width + torch.arange(width)).flatten()
    index = index[index < num_words(cut.size, bits)]  # the last unit may be cut short
    values = unpack(words.index_select(axis, index), bits, _held(index.numel(), bits), axis)
    return values.index_select(axis, place * lanes + order % lanes)


def _held(words: int, bits: int) -> int:
    """Values that lie wholly in so many words."""
    return words * 32 // bits
