"""Formats of few bits (quant/mx.py) and messages of them on the native CPU kernels."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..native import kernels
from ..quant import message, mx
from ..spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, Op, OpSignature

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_KINDS = {"e4m3": 1, "fp16": 2}


@lru_cache(maxsize=256)
def _format(element: str, block: int, scale: str, search: bool) -> kernels.MxFormat:
    """The record that the bindings take."""
    e = mx.check_format(element, block, scale, search)
    facts = (e.bits, e.exponent_bits, e.mantissa_bits, e.bias, e.emax, e.max_code)
    factors = mx.CANDIDATES[scale] if search else (1.0,)
    if scale in mx.FINE:
        top, carry_above = mx.FINE[scale].top, 0
        candidates = [factor / e.max_value for factor in factors]
    else:
        top, carry_above = 0, e.carry_above(scale)
        candidates = [math.log2(factor) for factor in factors]
    return kernels.MxFormat(facts, block, _KINDS.get(scale, 0), carry_above, top, candidates)


def mx_pack(a: MxPackArgs) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (..., n), both uint8."""
    mx.check_pack(a.x, a.element, a.block, a.scale, a.search)
    lead, n = a.x.shape[:-1], a.x.shape[-1]
    rows = lead.numel()
    codes = torch.empty((rows, mx.code_bytes(n, a.element)), dtype=torch.uint8)
    scales = torch.empty((rows, mx.scale_bytes(n, a.block, a.scale)), dtype=torch.uint8)
    x = a.x.reshape(rows, n).contiguous()
    kernels.mx_pack(x, codes, scales, _format(a.element, a.block, a.scale, a.search), torch.get_num_threads())
    return codes.view(*lead, codes.shape[1]), scales.view(*lead, scales.shape[1])


def mx_unpack(a: MxUnpackArgs) -> Tensor:
    """The values (..., n)."""
    mx.check_unpack(a.codes, a.scales, a.element, a.block, a.n, a.dtype, a.scale)
    lead = a.codes.shape[:-1]
    rows = lead.numel()
    out = torch.empty((rows, a.n), dtype=a.dtype)
    codes = a.codes.reshape(rows, a.codes.shape[-1]).contiguous()
    scales = a.scales.reshape(rows, a.scales.shape[-1]).contiguous()
    kernels.mx_unpack(
        out, codes, scales, _format(a.element, a.block, a.scale, False), torch.get_num_threads()
    )
    return out.view(*lead, a.n)


def encode(a: EncodeArgs) -> Tensor:
    """The message of x (rows, hidden), uint8 (Layout.nbytes,)."""
    rows, hidden = a.x.shape
    layout = message.Layout.of(rows, hidden, a.element, a.block, a.scale, a.outliers)
    out = torch.empty(layout.nbytes, dtype=torch.uint8)
    kind = _format(a.element, a.block, a.scale, a.search)
    kernels.encode(a.x.contiguous(), out, kind, a.rotate, a.outliers, a.threads)
    return out


def decode_sum(a: DecodeSumArgs) -> Tensor:
    """The sum of the messages, (rows, hidden)."""
    out = torch.empty((a.rows, a.hidden), dtype=a.dtype) if a.out is None else a.out
    kind = _format(a.element, a.block, a.scale, False)
    kernels.decode_sum(a.messages, out, kind, a.rotate, a.outliers, a.threads)
    return out


def _float_reasons(s: OpSignature) -> list[str]:
    return [] if s.dtype in FLOATS else [f"dtype {s.dtype}: only float32, float16 and bfloat16"]


FEATURES = frozenset({"even", "ceil", "e4m3", "fp16", "search", "rotate", "outliers"})
OPS: dict[str, Op] = {
    "mx_pack": Op(mx_pack, FEATURES, _float_reasons),
    "mx_unpack": Op(mx_unpack, FEATURES, _float_reasons),
    "encode": Op(encode, FEATURES, _float_reasons),
    "decode_sum": Op(decode_sum, FEATURES, _float_reasons),
}
