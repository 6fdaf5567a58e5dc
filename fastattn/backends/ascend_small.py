"""Every op but attention on Ascend: torch_npu's operator where it has one for the call, or our kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ascend_ops import ops as kernels
from ascend_ops import router
from ascend_ops.router import small_ops

from ..settings import settings
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
    UnsupportedError,
)
from .ascend import compiles_kernels, emulated, no_compiler
from .torch_ops import check_indices

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_BITS = {"int4": 4, "int8": 8, "dense": 16}


def _run(choose: Callable[[router.Chip], small_ops.Choice], kernel: Callable[[], Any]) -> Any:
    """By torch_npu if it can and may, otherwise by our kernel; UnsupportedError if neither."""
    if emulated():
        return kernel()
    choice: small_ops.Choice = "FASTATTN_ASCEND=kernels"
    if settings.ascend != "kernels":
        choice = choose(router.current())
        if isinstance(choice, router.Invocation):
            return choice()
    if settings.ascend == "torch_npu" or not compiles_kernels():
        why_not = "; ".join(no_compiler()) or "FASTATTN_ASCEND=torch_npu"
        raise UnsupportedError(f"on {router.current().family}: torch_npu: {choice}; our kernel: {why_not}")
    return kernel()


def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual) in x's dtype; the sum is empty without a residual."""
    out, total = _run(
        lambda chip: small_ops.rms_norm(a.x, a.weight, a.eps, a.residual, chip),
        lambda: kernels.rms_norm(a.x, a.weight, a.eps, a.residual),
    )
    return out, a.x.new_empty(0) if total is None else total


def swiglu(a: SwigluArgs) -> Tensor:
    """``silu(gate) * up`` of x (..., 2 F)."""
    found: Tensor = _run(lambda chip: small_ops.swiglu(a.x, chip), lambda: kernels.swiglu(a.x))
    return found


def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor.

    Our kernel where it compiles: torch_npu's wants cosines gathered, and all in float32 to be exact.
    """
    check_indices(a.positions, "positions", a.cos.shape[0])
    if compiles_kernels() and settings.ascend != "torch_npu":
        return kernels.rotary(a.x, a.cos, a.sin, a.positions, interleaved=a.interleaved)
    found: Tensor = _run(
        lambda chip: small_ops.rotary(a.x, a.cos, a.sin, a.positions, a.interleaved, chip),
        lambda: kernels.rotary(a.x, a.cos, a.sin, a.positions, interleaved=a.interleaved),
    )
    return found


def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the pages; negative slots are skipped."""
    pages, page = a.k_cache.shape[:2]
    check_indices(a.slots, "slots", pages * page, lowest=-(1 << 62))
    if a.cos is not None and a.positions is not None:
        check_indices(a.positions, "positions", a.cos.shape[0])
    if not compiles_kernels() and all(slot < 0 for slot in router.host(a.slots)):
        return  # torch_npu's scatter has no slot for rows that are skipped
    if a.slots.numel() and pages * page:
        _run(lambda chip: append_choice(a, chip), lambda: _append_kernel(a))


def append_choice(a: AppendKvArgs, chip: router.Chip) -> small_ops.Choice:
    """torch_npu's scatter where our kernel may not or cannot run; there, keys go through `rotary` first.

    The kernel turns the keys on the way and skips negative slots where they are; the scatter takes none, so
    that they would be read back on each layer, which no graph can capture.
    """
    if compiles_kernels() and settings.ascend != "torch_npu":
        return "slots: our kernel needs none of them on the host"
    k = a.k
    if a.cos is not None and a.sin is not None and a.positions is not None:
        if compiles_kernels():
            return "cos: our kernel turns the keys on the way"
        k = rotary(RotaryArgs(a.k, a.cos, a.sin, a.positions, a.interleaved))
    return small_ops.append_kv(a.k_cache, a.v_cache, k, a.v, a.slots, a.kv_layout, chip)


def _append_kernel(a: AppendKvArgs) -> None:
    kernels.append_kv(
        a.k_cache, a.v_cache, a.k, a.v, a.slots, cos=a.cos, sin=a.sin, positions=a.positions,
        interleaved=a.interleaved,
    )  # fmt: skip


def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` in x's dtype. On a device, a dense product is torch's own: CANN's matmul."""
    w, x = a.weight, a.x
    if w.format == "dense" and not emulated():
        x = x if w.x_perm is None else x.index_select(1, w.x_perm)
        bias = None if w.bias is None else w.bias.to(x.dtype)
        return F.linear(x, w.tensors["weight"].to(x.dtype), bias)
    found: Tensor = _run(
        lambda chip: _linear_choice(x, w, chip),
        lambda: kernels.linear(x, kernel_weight(w), w.bias),
    )
    return found


def _linear_choice(x: Tensor, w: PackedWeight, chip: router.Chip) -> small_ops.Choice:
    if w.format != "int8" or w.g_idx is not None or w.group_offset:
        return f"weight: {w.format}, npu_weight_quant_batchmatmul takes ours of int8 in whole groups"
    x = x if w.x_perm is None else x.index_select(1, w.x_perm)
    t = w.tensors
    return small_ops.int8_linear(x, t["codes"], t["scales"], t.get("mins"), w.group_size, w.bias, chip)


def kernel_weight(w: PackedWeight) -> kernels.Weight:
    """The weight as the kernels take it."""
    t = w.tensors
    return kernels.Weight(
        _BITS[w.format], w.shape, t["weight" if w.format == "dense" else "codes"], t.get("scales"),
        t.get("mins"), w.group_size, w.group_offset, w.g_idx, w.x_perm,
    )  # fmt: skip


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W (N, in)."""
    check_indices(a.ids, "ids", a.weight.shape[0])
    return kernels.embedding(a.ids, kernel_weight(a.weight), a.dtype)


# -------------------------------------------------------------------------------------------- reasons
def _float_reasons(s: OpSignature) -> list[str]:
    return [] if s.dtype in FLOATS else [f"dtype {s.dtype}: only float16, bfloat16 and float32"]


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _without_kernels(s: OpSignature, choose: Callable[[router.Chip], small_ops.Choice]) -> list[str]:
    """Where our kernels do not compile: torch_npu's reason against a call of this signature."""
    against = _float_reasons(s)
    if against or compiles_kernels():
        return against
    choice = choose(router.current())
    return [] if isinstance(choice, router.Invocation) else [choice, *no_compiler()]


def _norm_reasons(s: OpSignature) -> list[str]:
    hidden = int(s.dims[0])
    weight, *residual = (_meta(d, hidden) for d in s.other_dtypes)
    x = _meta(s.dtype, 1, hidden)
    other = residual[0][None] if residual else None
    return _without_kernels(s, lambda chip: small_ops.rms_norm(x, weight, 1e-5, other, chip))


def _rotary_reasons(s: OpSignature) -> list[str]:
    dim, half = (int(d) for d in s.dims)
    x, table, positions = _meta(s.dtype, 1, 1, dim), _meta(torch.float32, 1, half), _meta(torch.int64, 1)
    pairs = "interleaved" in s.features
    return _without_kernels(s, lambda chip: small_ops.rotary(x, table, table, positions, pairs, chip))


def _kernel_only(s: OpSignature) -> list[str]:
    return no_compiler() + _float_reasons(s)


def _gate_reasons(s: OpSignature) -> list[str]:
    x = _meta(s.dtype, 1, int(s.dims[0]))
    return _without_kernels(s, lambda chip: small_ops.swiglu(x, chip))


def _linear_reasons(s: OpSignature) -> list[str]:
    return _float_reasons(s) if s.dims[0] == "dense" else _kernel_only(s)


def _append_reasons(s: OpSignature) -> list[str]:
    out = _float_reasons(s)
    if s.other_dtypes[0] not in FLOATS:
        out.append(f"cache dtype {s.other_dtypes[0]}: only float16, bfloat16 and float32")
    if "npu_nz" in s.dims and compiles_kernels():
        out.append("kv_layout: nhd; NZ is for 310P and 910A")
    if out or compiles_kernels():
        return out
    dim, v_dim, layout = s.dims
    k_cache, v_cache = (_meta(s.other_dtypes[0], 1, 1, 1, int(d)) for d in (dim, v_dim))
    k, v = (_meta(s.dtype, 1, 1, int(d)) for d in (dim, v_dim))
    slots = torch.zeros(1, dtype=torch.int64)
    return _without_kernels(
        s, lambda chip: small_ops.append_kv(k_cache, v_cache, k, v, slots, str(layout), chip)
    )


APPEND_FEATURES = frozenset({"cos", "sin", "positions", "interleaved", "kv_layout"})
OPS: dict[str, Op] = {
    "append_kv": Op(append_kv, APPEND_FEATURES, _append_reasons),
    "rotary": Op(rotary, frozenset({"interleaved"}), _rotary_reasons),
    "rms_norm": Op(rms_norm, frozenset({"residual"}), _norm_reasons),
    "swiglu": Op(swiglu, reasons=_gate_reasons),
    "linear": Op(linear, frozenset({"g_idx", "x_perm", "bias", "group_offset"}), _linear_reasons),
    "embedding": Op(embedding, frozenset({"g_idx", "x_perm"}), _kernel_only),
}
