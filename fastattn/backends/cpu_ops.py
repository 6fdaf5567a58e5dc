"""Every op but attention on the native CPU kernels.

Adapters only: they allocate the result and hand tensors over; the bindings check shapes, dtypes and
indices and raise ValueError. A call costs a few microseconds beyond its kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..native import kernels
from ..spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    Op,
    OpSignature,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)
from . import cpu_mx

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Kernel = Callable[..., None]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# --------------------------------------------------------------------------------- rotary and KV append
def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the caches in place; raises before anything is written."""
    kernels.append_kv(
        a.k_cache, a.v_cache, _last_contiguous(a.k), _last_contiguous(a.v), a.slots.contiguous(),
        a.cos, a.sin, None if a.positions is None else a.positions.contiguous(), a.interleaved,
        torch.get_num_threads(),
    )  # fmt: skip


def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor."""
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    x = _last_contiguous(a.x)
    positions = a.positions.contiguous()
    kernels.rotary(x, a.cos, a.sin, positions, a.interleaved, out, torch.get_num_threads())
    return out


# ------------------------------------------------------------------------------------------ norm, gate
def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual) in x's dtype; the sum is empty without a residual."""
    x, residual, shape = a.x, a.residual, a.x.shape
    if len(shape) > 3:
        x = x.reshape(-1, *shape[-2:])
        residual = None if residual is None else residual.reshape(x.shape)
    # empty_like costs a third of empty.
    out = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    if residual is None:
        total = x.new_empty(0)
    else:
        residual, total = _last_contiguous(residual), torch.empty_like(out)
    kernels.rms_norm(_last_contiguous(x), a.weight, residual, out, total, a.eps, torch.get_num_threads())
    return out, total


def swiglu(a: SwigluArgs) -> Tensor:
    """``silu(gate) * up`` of x (..., 2 F)."""
    x, shape = a.x, a.x.shape
    flat = _last_contiguous(x) if len(shape) == 2 else x.reshape(shape[:-1].numel(), shape[-1])
    out = x.new_empty((flat.shape[0], shape[-1] // 2))
    kernels.swiglu(flat, out, torch.get_num_threads())
    return out if len(shape) == 2 else out.view(*shape[:-1], shape[-1] // 2)


# ---------------------------------------------------------------------------------------------- linear
def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` in x's dtype: few rows multiply W as it is read, many share its decoded tiles."""
    w = a.weight
    return unpacked_linear(
        a.x, list(w.tensors.values()), ",".join(w.tensors), w.format, *w.shape, w.group_size, w.group_offset,
        w.g_idx, w.x_perm, w.bias, a.act,
    )  # fmt: skip


def unpacked_linear(
    x: Tensor, tensors: list[Tensor], names: str, fmt: str, out: int, inn: int, group_size: int,
    group_offset: int, g_idx: Tensor | None, x_perm: Tensor | None, bias: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    """`linear` on the arguments of the torch op."""
    if x_perm is not None:
        x_perm = x_perm.long().contiguous()
    result: Tensor = kernels.linear_op(
        x, tensors, names, fmt, out, group_size, group_offset, g_idx, x_perm, bias, act,
        torch.get_num_threads(),
    )  # fmt: skip
    return result


def multiply(kernel: Kernel, x: Tensor, w: PackedWeight, act: str = "") -> Tensor:
    """``x @ W^T + bias`` by ``kernels.linear`` or ``kernels.gemm``; x in the order of W's stored columns."""
    out = x.new_empty((x.shape[0], w.shape[0]))
    bias = None if w.bias is None else w.bias.contiguous()
    kernel(_last_contiguous(x), out, *native_weight(w), bias, act, torch.get_num_threads())
    return out


def native_weight(
    w: PackedWeight,
) -> tuple[str, Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]:
    """The weight as the bindings take it."""
    t = w.tensors
    if w.format == "dense":
        return "dense", t["weight"], None, None, None, 0, 0
    return w.format, t["codes"], t["scales"], t.get("mins"), w.g_idx, w.group_size, w.group_offset


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W (N, in)."""
    out = a.ids.new_empty((a.ids.shape[0], a.weight.shape[1]), dtype=a.dtype)
    kernels.dequantize(out, *native_weight(a.weight), a.ids.contiguous(), torch.get_num_threads())
    return out


# -------------------------------------------------------------------------------------------- reasons
def _float_reasons(s: OpSignature) -> list[str]:
    return [] if s.dtype in FLOATS else [f"dtype {s.dtype}: only float32, float16 and bfloat16"]


def _append_reasons(s: OpSignature) -> list[str]:
    out = _float_reasons(s)
    if s.other_dtypes[0] not in FLOATS:
        out.append(f"cache dtype {s.other_dtypes[0]}: only float32, float16 and bfloat16")
    if "npu_nz" in s.dims:
        out.append("kv_layout: only nhd")
    return out


def _rotary_reasons(s: OpSignature) -> list[str]:
    angles = [] if s.other_dtypes == (torch.float32,) else [f"cos dtype {s.other_dtypes[0]}: only float32"]
    return _float_reasons(s) + angles


def _norm_reasons(s: OpSignature) -> list[str]:
    known = (s.dtype, torch.float32)
    names = ("weight", "residual")
    odd = [
        f"{n} dtype {d}: only x's or float32"
        for n, d in zip(names, s.other_dtypes, strict=False)
        if d not in known
    ]
    return _float_reasons(s) + odd


APPEND_FEATURES = frozenset({"cos", "sin", "positions", "interleaved"})
OPS: dict[str, Op] = {
    "append_kv": Op(append_kv, APPEND_FEATURES, _append_reasons),
    "rotary": Op(rotary, frozenset({"interleaved"}), _rotary_reasons),
    "rms_norm": Op(rms_norm, frozenset({"residual"}), _norm_reasons),
    "swiglu": Op(swiglu, reasons=_float_reasons),
    "linear": Op(linear, frozenset({"g_idx", "x_perm", "bias", "group_offset", "act"}), _float_reasons),
    "embedding": Op(embedding, frozenset({"g_idx"}), _float_reasons),
    **cpu_mx.OPS,
}
