"""Packing to and from formats of few bits, and the messages of compressed communication.

One program encodes a row: it is read once, rotated, scaled, rounded and packed in registers. One program
decodes a row of every message, adds them in their order and writes the sum once. What the formats are:
quant/mx.py; what a message is: quant/message.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton import next_power_of_2

from ..quant import message, mx
from ..spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, OpSignature
from . import launch
from .kernels.mx import decode_sum_kernel, encode_kernel
from .launch import Launch
from .norm import warps

BLOCKS = (8, 16, 32, 64, 128)


# ---------------------------------------------------------------------------------------------------- ops
def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (..., n), both uint8."""
    mx.check_pack(a.x, a.element, a.block, a.scale, a.search)
    n = a.x.shape[-1]
    x = a.x.reshape(-1, n)
    sizes = mx.code_bytes(n, a.element), mx.scale_bytes(n, a.block, a.scale)
    codes, scales = (a.x.new_empty((*a.x.shape[:-1], size), dtype=torch.uint8) for size in sizes)
    _launch_encode(x, None, codes, scales, n, *sizes, a.element, a.block, a.scale, a.search, 0)
    return codes, scales


def encode_message(a: EncodeArgs) -> Tensor:
    """The message of x (rows, hidden), uint8 (Layout.nbytes,)."""
    rows, hidden = a.x.shape
    layout = message.Layout.of(rows, hidden, a.element, a.block, a.scale, a.outliers)
    kept, outliers = _channels(hidden, a.outliers, a.x.device)
    out = a.x.new_empty(layout.nbytes, dtype=torch.uint8)
    codes, scales, values = (out[span] for span in layout.spans)
    _launch_encode(
        a.x, kept if a.outliers else None, codes, scales, layout.kept, layout.code_bytes, layout.scale_bytes,
        a.element, a.block, a.scale, a.search, a.rotate,
    )  # fmt: skip
    if a.outliers:
        values.copy_(a.x[:, outliers].bfloat16().view(torch.uint8).flatten())
    return out


def _launch_encode(
    x: Tensor, kept: Tensor | None, codes: Tensor, scales: Tensor, n: int, code_bytes: int, scale_bytes: int,
    element: str, block: int, scale: str, search: bool, rotate: int,
) -> None:  # fmt: skip
    rows = x.shape[0]
    if not rows or not scale_bytes:
        return
    x = x if x.stride(-1) == 1 else x.contiguous()
    e = mx.element(element)
    fine = mx.FINE.get(scale)
    tried = mx.CANDIDATES[scale] if search else (1.0,)
    powers = {1.0: 0, 2.0: 1, 0.5: -1}
    blocks = next_power_of_2(-(-n // block)) if n else 1
    args = (x, kept, codes, scales, x.stride(0), n, code_bytes, scale_bytes)
    candidates = tuple(f / e.max_value for f in tried) if fine else tuple(powers[f] for f in tried)
    constants = (
        block, blocks, e.bits, *_rotation(rotate, n), *_element(e), e.max_code, e.max_value, e.emax,
        e.carry_above(scale), *_scale(scale), fine.top if fine else 0, fine.nan if fine else mx.SCALE_NAN,
        candidates, len(tried), e.error_unit, float(mx.ERROR_MAX),
    )  # fmt: skip
    lanes = warps(blocks * block)
    launch.run([Launch(encode_kernel, rows, args, constants, lanes, 1, fuse=False)], x.device)


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n), computed in float32 and rounded once to ``dtype``."""
    mx.check_unpack(a.codes, a.scales, a.element, a.block, a.n, a.dtype, a.scale)
    lead = a.codes.shape[:-1]
    joined = torch.cat((a.codes.flatten(), a.scales.flatten()))
    out = a.codes.new_empty((*lead, a.n), dtype=a.dtype)
    rows = lead.numel()
    _launch_decode((joined,), None, out, rows, a.n, a.n, a.codes.shape[-1], a.scales.shape[-1], a, 0)
    return out


def decode_sum(a: DecodeSumArgs) -> Tensor:
    """The sum of the messages (rows, hidden): float32, in their order, rounded once to ``dtype``."""
    layout = message.Layout.of(a.rows, a.hidden, a.element, a.block, a.scale, a.outliers)
    device = a.messages[0].device
    kept, outliers = _channels(a.hidden, a.outliers, device)
    out = a.out if a.out is not None else torch.empty((a.rows, a.hidden), dtype=a.dtype, device=device)
    _launch_decode(
        a.messages, kept if a.outliers else None, out, a.rows, layout.kept, a.hidden, layout.code_bytes,
        layout.scale_bytes, a, a.rotate,
    )  # fmt: skip
    if a.outliers and a.rows:
        total: Tensor | None = None
        for m in a.messages:
            # A copy: bfloat16 must begin at an even byte.
            part = m[layout.spans[2]].clone().view(torch.bfloat16).view(a.rows, -1).float()
            total = part if total is None else total + part
        assert total is not None
        out[:, outliers] = total.to(a.dtype)
    return out


def _launch_decode(
    messages: tuple[Tensor, ...], kept: Tensor | None, out: Tensor, rows: int, n: int, hidden: int,
    code_bytes: int, scale_bytes: int, a: MxUnpackArgs | DecodeSumArgs, rotate: int,
) -> None:  # fmt: skip
    if not rows or not n:
        return
    e = mx.element(a.element)
    width = max(next_power_of_2(n), rotate)
    args = (messages, kept, out, n, hidden, code_bytes, scale_bytes, rows * code_bytes)
    constants = (
        len(messages), width, a.block, e.bits, *_rotation(rotate, n), *_element(e), *_scale(a.scale)
    )  # fmt: skip
    launch.run([Launch(decode_sum_kernel, rows, args, constants, warps(width), 1, fuse=False)], out.device)


def _element(e: mx.MxElement) -> tuple[int, int, int]:
    return e.exponent_bits, e.mantissa_bits, e.bias


def _scale(name: str) -> tuple[str, bool, int]:
    """(name, whether it is a fine one, bytes)."""
    return name, name in mx.FINE, mx.FINE[name].bytes if name in mx.FINE else 1


def _rotation(length: int, n: int) -> tuple[int, int, float]:
    """(length of the rotated blocks, values in them, what they are multiplied by)."""
    whole = n // length * length if length else 0
    factor = float(torch.tensor(length**-0.5, dtype=torch.float32)) if whole else 1.0
    return length if whole else 0, whole, factor


@cache  # for good: a CUDA graph may hold their addresses
def _channels(hidden: int, outliers: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the channels that are quantized, and of the outliers."""
    quantized = torch.ones(hidden, dtype=torch.bool)
    index = torch.tensor(outliers, dtype=torch.int64)
    quantized[index] = False
    return quantized.nonzero().flatten().to(device), index.to(device)


def reasons(s: OpSignature) -> list[str]:
    """Of all four ops: block lengths whose codes fill whole bytes, in powers of two."""
    block = s.dims[1]
    return [] if block in BLOCKS else [f"block {block}, it takes {', '.join(map(str, BLOCKS))}"]
