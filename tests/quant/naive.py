"""Bits on disk read one by one in plain Python: shares no code with the packages' packers."""

from __future__ import annotations

import torch
from torch import Tensor


def stream(words: list[int], bits: int, n: int) -> list[int]:
    """``n`` values out of 32-bit words whose bits follow each other, lowest first."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i)) % 2**bits for i in range(n)]


def gptq(tensors: dict[str, Tensor], bits: int, out: int, inn: int, *, v1: bool, group_size: int) -> Tensor:
    """The float64 matrix (out, in) of GPTQ tensors; ``tensors["g_idx"]`` may be missing."""
    qweight, qzeros, scales = (tensors[n] for n in ("qweight", "qzeros", "scales"))
    g_idx = tensors.get("g_idx")
    zeros = [stream(row.tolist(), bits, out) for row in qzeros]
    if v1:
        zeros = [[(z + 1) % 2**bits for z in row] for row in zeros]
    groups = _groups(g_idx, inn, group_size)
    rows = []
    for o in range(out):
        q, s = stream(qweight[:, o].tolist(), bits, inn), scales[:, o].tolist()
        rows.append([s[g] * (q[c] - zeros[g][o]) for c, g in enumerate(groups)])
    return torch.tensor(rows, dtype=torch.float64).view(out, inn)


def _groups(g_idx: Tensor | None, inn: int, group_size: int) -> list[int]:
    if g_idx is not None:
        return [int(g) for g in g_idx]
    return [0 if group_size == -1 else c // group_size for c in range(inn)]


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
    q = [awq_row(row.tolist()) for row in tensors["qweight"]]
    zeros = [awq_row(row.tolist()) for row in tensors["qzeros"]]
    scales, groups = tensors["scales"].tolist(), _groups(None, inn, group_size)
    rows = [[scales[g][o] * (q[c][o] - zeros[g][o]) for c, g in enumerate(groups)] for o in range(out)]
    return torch.tensor(rows, dtype=torch.float64).view(out, inn)


def compressed(tensors: dict[str, Tensor], bits: int, *, group_size: int) -> Tensor:
    """The float64 matrix (out, in) of compressed-tensors' pack-quantized tensors."""
    out, inn = (int(n) for n in tensors["weight_shape"])
    half = 2 ** (bits - 1)
    groups = _groups(tensors.get("weight_g_idx"), inn, group_size)
    stored = tensors.get("weight_zero_point")
    columns = [] if stored is None else [stream(column.tolist(), bits, out) for column in stored.t()]
    rows = []
    for o in range(out):
        q, s = stream(tensors["weight_packed"][o].tolist(), bits, inn), tensors["weight_scale"][o].tolist()
        zeros = [column[o] - half for column in columns] or [0] * len(s)
        rows.append([s[g] * (q[c] - half - zeros[g]) for c, g in enumerate(groups)])
    return torch.tensor(rows, dtype=torch.float64).view(out, inn)
