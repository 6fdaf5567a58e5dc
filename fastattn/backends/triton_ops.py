"""Every op but attention on the Triton kernels: features, reasons, and checks of what the host can see."""

from __future__ import annotations

from torch import Tensor

from ..spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    Op,
    OpSignature,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)
from ..triton_ops import append, dequantize, gate, linear, mx, norm, rotary
from .torch_mx import FEATURES as MX_FEATURES
from .torch_ops import check_indices
from .triton import DTYPES, device_reasons


def _append_kv(a: AppendKvArgs) -> None:
    check_indices(a.slots, "slots", a.k_cache.shape[0] * a.k_cache.shape[1], lowest=-(1 << 62))
    if a.cos is not None and a.positions is not None:
        check_indices(a.positions, "positions", a.cos.shape[0])
    append.append_kv(a)


def _rotary(a: RotaryArgs) -> Tensor:
    check_indices(a.positions, "positions", a.cos.shape[0])
    return rotary.rotary(a)


def _embedding(a: EmbeddingArgs) -> Tensor:
    check_indices(a.ids, "ids", a.weight.shape[0])
    return dequantize.embedding(a)


def _rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    return norm.rms_norm(a)


def _swiglu(a: SwigluArgs) -> Tensor:
    return gate.swiglu(a)


def _linear(a: LinearArgs) -> Tensor:
    return linear.linear(a)


# -------------------------------------------------------------------------------------------- reasons
def _reasons(s: OpSignature) -> list[str]:
    return device_reasons(s.device, s.dtype)


def _append_reasons(s: OpSignature) -> list[str]:
    reasons = _reasons(s)
    if s.other_dtypes[0] not in DTYPES:
        reasons.append(f"cache dtype {s.other_dtypes[0]}, it takes {', '.join(map(str, DTYPES))}")
    return reasons + (["kv_layout: only nhd"] if "npu_nz" in s.dims else [])


def _mx_reasons(s: OpSignature) -> list[str]:
    return _reasons(s) + mx.reasons(s)


_WEIGHT = frozenset({"g_idx", "x_perm"})
OPS: dict[str, Op] = {
    "append_kv": Op(
        _append_kv,
        frozenset({"cos", "sin", "positions", "interleaved", "k_scale", "v_scale"}),
        _append_reasons,
    ),
    "rotary": Op(_rotary, frozenset({"interleaved"}), _reasons),
    "rms_norm": Op(_rms_norm, frozenset({"residual"}), _reasons),
    "swiglu": Op(_swiglu, reasons=_reasons),
    "linear": Op(_linear, _WEIGHT | {"bias", "group_offset", "act"}, _reasons),
    "embedding": Op(_embedding, _WEIGHT, _reasons),
    "mx_pack": Op(mx.mx_pack, MX_FEATURES, _mx_reasons),
    "mx_unpack": Op(mx.mx_unpack, MX_FEATURES, _mx_reasons),
    "encode": Op(mx.encode_message, MX_FEATURES, _mx_reasons),
    "decode_sum": Op(mx.decode_sum, MX_FEATURES, _mx_reasons),
}
