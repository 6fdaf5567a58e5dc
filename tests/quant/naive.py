"""Bits on disk read one by one in plain Python: shares no code with the packages' packers."""

from __future__ import annotations

import torch
from torch import Tensor


def stream(words: list[int], bits: int, n: int) -> list[int]:
    """``n`` values out of 32-bit words whose bits follow each other, lowest first."""
    ones = [(word >> b) & 1 for word in words for b in range(32)]
    return [sum(ones[i * bits + b] << b for b in range(bits)) for i in range(n)]


def gptq(tensors: dict[str, Tensor], bits: int, out: int, inn: int, *, v1: bool, group_size: int) -> Tensor:
    """The float64 matrix (out, in) of GPTQ tensors; ``tensors["g_idx"]`` may be missing."""
    qweight, qzeros, scales = (tensors[n] for n in ("qweight", "qzeros", "scales"))
    g_idx = tensors.get("g_idx")
    zeros = [stream([int(w) for w in row], bits, out) for row in qzeros]
    if v1:
        zeros = [[(z + 1) % 2**bits for z in row] for row in zeros]
    result = torch.zeros(out, inn, dtype=torch.float64)
    for o in range(out):
        q = stream([int(w) for w in qweight[:, o]], bits, inn)
        for c in range(inn):
            group = int(g_idx[c]) if g_idx is not None else (0 if group_size == -1 else c // group_size)
            result[o, c] = float(scales[group, o]) * (q[c] - zeros[group][o])
    return result


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word belongs to this column of its eight


def awq_row(words: list[int]) -> list[int]:
    """A row of 4-bit values packed along out as AWQ's gemm layout interleaves them."""
    values = [0] * (8 * len(words))
    for w, word in enumerate(words):
        for nibble, column in enumerate(AWQ_ORDER):
            values[8 * w + column] = (word >> (4 * nibble)) & 15
    return values


def awq(tensors: dict[str, Tensor], out: int, inn: int, *, group_size: int) -> Tensor:
    """The float64 matrix (out, in) of AWQ tensors."""
    q = [awq_row([int(w) for w in row]) for row in tensors["qweight"]]
    zeros = [awq_row([int(w) for w in row]) for row in tensors["qzeros"]]
    result = torch.zeros(out, inn, dtype=torch.float64)
    for c in range(inn):
        group = 0 if group_size == -1 else c // group_size
        for o in range(out):
            result[o, c] = float(tensors["scales"][group, o]) * (q[c][o] - zeros[group][o])
    return result


def compressed(tensors: dict[str, Tensor], bits: int, *, group_size: int) -> Tensor:
    """The float64 matrix (out, in) of compressed-tensors' pack-quantized tensors."""
    out, inn = (int(n) for n in tensors["weight_shape"])
    half = 2 ** (bits - 1)
    result = torch.zeros(out, inn, dtype=torch.float64)
    zeros = tensors.get("weight_zero_point")
    g_idx = tensors.get("weight_g_idx")
    for o in range(out):
        q = stream([int(w) for w in tensors["weight_packed"][o]], bits, inn)
        for c in range(inn):
            group = int(g_idx[c]) if g_idx is not None else (0 if group_size == -1 else c // group_size)
            zero = 0
            if zeros is not None:
                zero = stream([int(w) for w in zeros[:, group]], bits, out)[o] - half
            result[o, c] = float(tensors["weight_scale"][o, group]) * (q[c] - half - zero)
    return result
