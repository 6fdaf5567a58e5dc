"""fastattn's torch ops: schemas, fake kernels, and the functions that call them.

Each op is one `torch.library` definition for all devices. Its implementation packs the arguments into
the record of `spec`, and `dispatch.run` finds the backend. `fastattn::attention` is called through
`fastattn.attention`, which validates.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from . import dispatch
from .indices import check_indices
from .quant import mx
from .settings import settings
from .spec import (
    AppendKvArgs,
    AttentionArgs,
    EmbeddingArgs,
    LinearArgs,
    MxPackArgs,
    MxUnpackArgs,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
    UnsupportedError,
)

#: What queries, activations and other numbers of a call may be.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_lib = torch.library.Library("fastattn", "DEF")
_ops = torch.ops.fastattn


def _define(schema: str, impl, fake) -> None:  # type: ignore[no-untyped-def]
    name = schema.split("(", 1)[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _lib.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_lib)


def refuse_grad(**tensors: Tensor | None) -> None:
    """Raises UnsupportedError naming the first tensor that autograd would record."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise UnsupportedError(
                f"{name}: requires grad; fastattn is an inference library and has no backward pass: call it "
                f"under torch.no_grad() or torch.inference_mode(), or pass {name}.detach()"
            )


def _check_floats(x: Tensor) -> None:
    if not x.ndim:
        raise ValueError("x: a scalar, expected at least one dimension")
    if x.dtype not in DTYPES:
        raise ValueError(f"x: {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")


# ------------------------------------------------------------------------------------------ attention
ATTENTION_SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int? window_left, int? window_right,"
    " float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? attn_mask, Tensor? cu_seqlens_q,"
    " Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table,"
    " Tensor? seqused_k, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? q_pos0, Tensor? k_pos0,"
    " str kv_layout, Tensor? k_scale, Tensor? v_scale, bool return_lse, str backend) -> (Tensor, Tensor)"
)


def call_attention(a: AttentionArgs, backend: str | None) -> tuple[Tensor, Tensor]:
    """Runs a validated record as the torch op; the lse is empty unless asked for."""
    out, lse = _ops.attention.default(*a[:5], *a.window, *a[6:], backend or "")
    return out, lse


def _attention(*flat) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    args = AttentionArgs._make((*flat[:5], (flat[5], flat[6]), *flat[7:-1]))
    if settings.strict:
        check_indices(args)
    return dispatch.run("attention", args, flat[-1])


def _attention_fake(*flat) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    q, v, return_lse = flat[0], flat[2], flat[-2]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    if not return_lse:
        return out, q.new_empty((0,), dtype=torch.float32)
    *lead, heads, _ = q.shape
    shape = (lead[0], heads, lead[1]) if len(lead) == 2 else (heads, lead[0])
    return out, q.new_empty(shape, dtype=torch.float32)


_define(ATTENTION_SCHEMA, _attention, _attention_fake)


# ------------------------------------------------------------------------------------------ KV append
def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    kv_layout: str = "nhd",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Writes ``k`` and ``v`` (N, Hkv, D) into a cache at ``slots``, in place; see `spec.AppendKvArgs`.

    Raises ValueError when shapes or dtypes disagree and, where indices are on the host or FASTATTN_STRICT
    is set, for a slot past the cache; the cache is unchanged then.
    """
    refuse_grad(k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    rows = slots.shape[0] if slots.ndim == 1 else -1
    for name, cache, new, scale in (("k", k_cache, k, k_scale), ("v", v_cache, v, v_scale)):
        expected = (rows, *cache.shape[2:])
        if cache.ndim != 4 or new.ndim != 3 or tuple(new.shape) != expected:
            raise ValueError(
                f"{name}: {tuple(new.shape)}, {name}_cache {tuple(cache.shape)}, slots {tuple(slots.shape)}; "
                "expected (N, heads, head_dim), (pages, page, heads, head_dim) and (N,)"
            )
        if new.dtype != cache.dtype and scale is None:
            raise ValueError(
                f"{name}: {new.dtype}, {name}_cache is {cache.dtype} (another type needs {name}_scale)"
            )
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(f"v_cache: {tuple(v_cache.shape)}, k_cache is {tuple(k_cache.shape)}")
    if slots.dtype != torch.int64:
        raise ValueError(f"slots: {slots.dtype}, expected int64")
    if (cos is None) != (sin is None) or (cos is None) != (positions is None):
        raise ValueError("cos, sin and positions: give all three or none")
    if cos is not None and sin is not None and positions is not None:
        _check_rotary(k, cos, sin, positions)
    _ops.append_kv(
        k_cache, v_cache, k, v, slots, cos, sin, positions, interleaved, kv_layout, k_scale, v_scale,
        backend or "",
    )  # fmt: skip


def _append_kv(*flat) -> None:  # type: ignore[no-untyped-def]
    dispatch.run("append_kv", AppendKvArgs(*flat[:-1]), flat[-1])


_define(
    "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slots, Tensor? cos,"
    " Tensor? sin, Tensor? positions, bool interleaved, str kv_layout, Tensor? k_scale, Tensor? v_scale,"
    " str backend) -> ()",
    _append_kv,
    lambda *flat: None,
)


# --------------------------------------------------------------------------------------------- rotary
def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x`` (N, heads, D) rotated to ``positions`` (N,); see `spec.RotaryArgs`."""
    refuse_grad(x=x)
    _check_floats(x)
    if x.ndim != 3:
        raise ValueError(f"x: {tuple(x.shape)}, expected (N, heads, head_dim)")
    _check_rotary(x, cos, sin, positions)
    return _ops.rotary(x, cos, sin, positions, interleaved, backend or "")


def _check_rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos, sin: {tuple(cos.shape)}, {tuple(sin.shape)}, expected (max_position, rotary_dim / 2) with "
            f"rotary_dim at most head_dim {x.shape[-1]}"
        )
    if positions.dtype != torch.int64 or tuple(positions.shape) != tuple(x.shape[:1]):
        raise ValueError(
            f"positions: {positions.dtype} {tuple(positions.shape)}, expected int64 ({x.shape[0]},)"
        )


_define(
    "rotary(Tensor x, Tensor cos, Tensor sin, Tensor positions, bool interleaved, str backend) -> Tensor",
    lambda *flat: dispatch.run("rotary", RotaryArgs(*flat[:-1]), flat[-1]),
    lambda x, *rest: x.new_empty(x.shape),
)


# -------------------------------------------------------------------------------------- norm and gate
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm of ``x + residual`` and that sum (empty without a residual); see `spec.RmsNormArgs`."""
    refuse_grad(x=x, weight=weight, residual=residual)
    _check_floats(x)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps: {eps}, expected a finite number >= 0")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: {tuple(residual.shape)}, expected {tuple(x.shape)}")
    normed, total = _ops.rms_norm(x, weight, eps, residual, backend or "")
    return normed, total


_define(
    "rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual, str backend) -> (Tensor, Tensor)",
    lambda *flat: dispatch.run("rms_norm", RmsNormArgs(*flat[:-1]), flat[-1]),
    lambda x, w, eps, residual, backend: (
        x.new_empty(x.shape),
        x.new_empty((0,) if residual is None else x.shape),
    ),
)


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """``silu(gate) * up`` of ``x`` (N, 2 F), gate first."""
    refuse_grad(x=x)
    _check_floats(x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: last dimension {x.shape[-1]} is odd, expected gate and up of equal width")
    return _ops.swiglu(x, backend or "")


_define(
    "swiglu(Tensor x, str backend) -> Tensor",
    lambda x, backend: dispatch.run("swiglu", SwigluArgs(x), backend),
    lambda x, backend: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),
)


# --------------------------------------------------------------------------------------------- linear
def check_act(act: str) -> None:
    """Raises ValueError unless ``act`` is one of `linear`'s."""
    if act not in ("", "int8"):
        raise ValueError(f"act: {act!r}, expected '' or 'int8'")


def linear(x: Tensor, weight: PackedWeight, *, act: str = "", backend: str | None = None) -> Tensor:
    """``x`` (N, in) times a packed weight (out, in), plus its bias; returns (N, out) in x's dtype.

    ``act="int8"`` allows a backend to quantize ``x`` to 8-bit integers; without it none ever does.
    """
    w = weight
    if torch.is_grad_enabled():
        refuse_grad(x=x, bias=w.bias, **w.tensors)
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x: {tuple(x.shape)}, expected (N, {w.shape[1]})")
    check_act(act)
    return _ops.linear.default(
        x, list(w.tensors.values()), ",".join(w.tensors), w.format, *w.shape, w.group_size, w.group_offset,
        w.g_idx, w.x_perm, w.bias, act, backend or "",
    )  # fmt: skip


def _linear_on_cpu(x, *flat):  # type: ignore[no-untyped-def]
    if not dispatch.cpu_comes_first(flat[-1]) or x.dtype not in _cpu_ops().FLOATS:
        return _linear(x, *flat)
    dispatch.calls["cpu", "linear"] += 1
    return _cpu_ops().unpacked_linear(x, *flat[:-1])


@functools.cache
def _cpu_ops() -> ModuleType:
    from .backends import cpu_ops  # loads the native kernels

    return cpu_ops


def _linear(x, tensors, names, fmt, out, inn, group_size, group_offset, g_idx, x_perm, bias, act, backend):  # type: ignore[no-untyped-def]
    named = dict(zip(names.split(","), tensors, strict=True))
    weight = PackedWeight(fmt, (out, inn), named, group_size, group_offset, g_idx, x_perm, bias)
    return dispatch.run("linear", LinearArgs(x, weight, act), backend)


_define(
    "linear(Tensor x, Tensor[] tensors, str names, str format, int out, int inn, int group_size,"
    " int group_offset, Tensor? g_idx, Tensor? x_perm, Tensor? bias, str act, str backend) -> Tensor",
    _linear,
    lambda x, tensors, names, fmt, out, *rest: x.new_empty((x.shape[0], out)),
)
_lib.impl("linear", _linear_on_cpu, "CPU")


def embedding(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """Rows ``ids`` (N,) of a packed weight (out, in) as (N, in) of ``dtype``.

    Raises ValueError for an id outside ``0..out - 1``; on an accelerator only with FASTATTN_STRICT.
    """
    refuse_grad(**weight.tensors)
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids: {ids.dtype} {tuple(ids.shape)}, expected int64 (N,)")
    w = weight
    return _ops.embedding(
        ids, list(w.tensors.values()), ",".join(w.tensors), w.format, *w.shape, w.group_size, w.group_offset,
        w.g_idx, w.x_perm, dtype, backend or "",
    )  # fmt: skip


def _embedding(ids, tensors, names, fmt, out, inn, group_size, group_offset, g_idx, x_perm, dtype, backend):  # type: ignore[no-untyped-def]
    named = dict(zip(names.split(","), tensors, strict=True))
    weight = PackedWeight(fmt, (out, inn), named, group_size, group_offset, g_idx, x_perm)
    return dispatch.run("embedding", EmbeddingArgs(ids, weight, dtype), backend)


_define(
    "embedding(Tensor ids, Tensor[] tensors, str names, str format, int out, int inn, int group_size,"
    " int group_offset, Tensor? g_idx, Tensor? x_perm, ScalarType dtype, str backend) -> Tensor",
    _embedding,
    lambda ids, tensors, names, fmt, out, inn, *rest: ids.new_empty((ids.shape[0], inn), dtype=rest[-2]),
)


# ------------------------------------------------------------------------------------------------- MX
def mx_pack(
    x: Tensor,
    element: str,
    block: int = 32,
    scale: str = "floor",
    search: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(codes, scales), both uint8, of ``x`` (..., n) in a format of `quant.mx`; see `spec.MxPackArgs`."""
    mx.check_format(element, block, scale, search)
    codes, scales = _ops.mx_pack(x, element, block, scale, search, backend or "")
    return codes, scales


def mx_unpack(
    codes: Tensor,
    scales: Tensor,
    element: str,
    n: int,
    block: int = 32,
    dtype: torch.dtype = torch.float32,
    scale: str = "floor",
    *,
    backend: str | None = None,
) -> Tensor:
    """The values (..., n) that `mx_pack` kept."""
    mx.check_format(element, block, scale)
    if n < 0:
        raise ValueError(f"n: {n}, expected at least 0")
    expected = _mx_shapes(codes.shape[:-1], n, element, block, scale)
    if (tuple(codes.shape), tuple(scales.shape)) != expected:
        raise ValueError(f"codes, scales: {tuple(codes.shape)}, {tuple(scales.shape)}, expected {expected}")
    return _ops.mx_unpack(codes, scales, element, block, n, dtype, scale, backend or "")


def _mx_shapes(
    lead: torch.Size, n: int, element: str, block: int, scale: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (*lead, mx.code_bytes(n, element)), (*lead, mx.scale_bytes(n, block, scale))


def _mx_pack_fake(x, element, block, scale, search, backend):  # type: ignore[no-untyped-def]
    codes, scales = _mx_shapes(x.shape[:-1], x.shape[-1], element, block, scale)
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(scales, dtype=torch.uint8)


_define(
    "mx_pack(Tensor x, str element, int block, str scale, bool search, str backend) -> (Tensor, Tensor)",
    lambda *flat: dispatch.run("mx_pack", MxPackArgs(*flat[:-1]), flat[-1]),
    _mx_pack_fake,
)
_define(
    "mx_unpack(Tensor codes, Tensor scales, str element, int block, int n, ScalarType dtype, str scale,"
    " str backend) -> Tensor",
    lambda *flat: dispatch.run("mx_unpack", MxUnpackArgs(*flat[:-1]), flat[-1]),
    lambda codes, scales, element, block, n, dtype, scale, backend: codes.new_empty(
        (*codes.shape[:-1], n), dtype=dtype
    ),
)
