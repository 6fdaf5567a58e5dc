"""Every op but attention in plain torch: any device, any dtype the records allow.

Arithmetic is float32, rounded once to the result's dtype. Indices on an accelerator are not read back:
a slot or position out of range is skipped or clamped there, unless FASTATTN_STRICT asks for the check.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..indices import readable, within
from ..quant import packed
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
from . import torch_mx

# Values of a dequantized tile of a large weight: 64 MB in float32.
TILE = 1 << 24


def check_indices(index: Tensor, name: str, size: int, lowest: int = 0) -> None:
    """Raises ValueError for an index outside ``lowest..size - 1``; on an accelerator only when strict."""
    if readable(index):
        within(name, index, lowest, size - 1)


# --------------------------------------------------------------------------------- rotary and KV append
def rotary(a: RotaryArgs) -> Tensor:
    """``x`` (N, heads, D) rotated; a new contiguous tensor of x's dtype."""
    check_indices(a.positions, "positions", a.cos.shape[0])
    if not a.x.numel():
        return torch.empty_like(a.x, memory_format=torch.contiguous_format)
    return _rotate(a.x, a.cos, a.sin, a.positions, a.interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    index = positions.clamp(0, cos.shape[0] - 1)
    c, s = cos[index].float()[:, None], sin[index].float()[:, None]
    half = cos.shape[-1]
    head = x[..., : 2 * half].float()
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head[..., :half], head[..., half:]
    turned = (first * c - second * s, second * c + first * s)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[..., : 2 * half] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


def append_kv(a: AppendKvArgs) -> None:
    """Writes k and v (N, Hkv, D) into the caches; negative slots are skipped."""
    pages, page = a.k_cache.shape[:2]
    check_indices(a.slots, "slots", pages * page, lowest=-(1 << 62))
    k = a.k
    if a.cos is not None and a.sin is not None and a.positions is not None:
        check_indices(a.positions, "positions", a.cos.shape[0])
        if k.numel():
            k = _rotate(k, a.cos, a.sin, a.positions, a.interleaved)
    if not a.slots.numel() or not pages * page:
        return
    # A skipped row repeats the write of the first valid row, so that shapes never depend on values. If
    # there is none, all rows rewrite slot 0 with what it holds.
    valid = (a.slots >= 0) & (a.slots < pages * page)
    source = torch.where(valid, torch.arange(a.slots.numel(), device=a.slots.device), valid.int().argmax())
    slots = a.slots[source].clamp(0, pages * page - 1)
    where = (slots.div(page, rounding_mode="floor"), slots % page)
    for cache, new, scale in ((a.k_cache, k, a.k_scale), (a.v_cache, a.v, a.v_scale)):
        rows = new[source] if scale is None else new[source].float() / scale[:, None]
        cache[where] = torch.where(valid.any(), rows.to(cache.dtype), cache[where])


def _append_reasons(s: OpSignature) -> list[str]:
    return ["kv_layout: only nhd"] if "npu_nz" in s.dims else []


# ------------------------------------------------------------------------------------------ norm, gate
def rms_norm(a: RmsNormArgs) -> tuple[Tensor, Tensor]:
    """(normalised, x + residual), both in x's dtype; the sum is empty without a residual."""
    if a.residual is None:
        total, x = a.x.new_empty(0), a.x.float()
    else:
        total = (a.x.float() + a.residual.float()).to(a.x.dtype)
        x = total.float()
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + a.eps)
    return (x * scale * a.weight.float()).to(a.x.dtype), total


def swiglu(a: SwigluArgs) -> Tensor:
    """``silu(gate) * up`` of x (..., 2 F)."""
    gate, up = a.x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(a.x.dtype)


# ---------------------------------------------------------------------------------------------- linear
def linear(a: LinearArgs) -> Tensor:
    """``x @ W^T + bias`` in x's dtype, through dequantized tiles of W."""
    # torch's float16 GEMM on a CPU is a thousand times slower than its float32 one.
    slow = a.x.device.type == "cpu" and a.x.dtype == torch.float16
    work = torch.float32 if slow else a.x.dtype
    return tiled_linear(a.x.to(work), a.weight).to(a.x.dtype)


def tiled_linear(x: Tensor, w: PackedWeight) -> Tensor:
    """``x @ W^T + bias`` computed in x's dtype, dequantizing at most `TILE` values of W at a time."""
    out, inn = w.shape
    step = max(1, TILE // max(inn, 1))
    pieces = [packed.slice_out(w, lo, min(lo + step, out)) for lo in range(0, out, step)]
    if len(pieces) == 1:
        return _dequantized_linear(x, w)
    result = x.new_empty((x.shape[0], out))
    for lo, piece in zip(range(0, out, step), pieces, strict=True):
        result[:, lo : lo + step] = _dequantized_linear(x, piece)
    return result


def _dequantized_linear(x: Tensor, w: PackedWeight) -> Tensor:
    bias = None if w.bias is None else w.bias.to(x.dtype)
    return F.linear(x, packed.dequantize(w, x.dtype), bias)


def embedding(a: EmbeddingArgs) -> Tensor:
    """Rows ``ids`` of W (N, in)."""
    check_indices(a.ids, "ids", a.weight.shape[0])
    return packed.rows(a.weight, a.ids, a.dtype)


APPEND_FEATURES = frozenset({"cos", "sin", "positions", "interleaved"})
OPS: dict[str, Op] = {
    "append_kv": Op(append_kv, APPEND_FEATURES | {"k_scale", "v_scale"}, _append_reasons),
    "rotary": Op(rotary, frozenset({"interleaved"})),
    "rms_norm": Op(rms_norm, frozenset({"residual"})),
    "swiglu": Op(swiglu),
    "linear": Op(linear, frozenset({"g_idx", "x_perm", "bias", "group_offset", "act"})),
    "embedding": Op(embedding, frozenset({"g_idx", "x_perm"})),
    **torch_mx.OPS,
}
