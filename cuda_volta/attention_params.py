"""The parameters that the attention kernels share (`kernels/attention.cuh`), filled from tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import expect, expect_device, expect_half, in_octets

_POINTERS = (
    "q", "k", "v", "out", "lse", "alibi_slopes", "sinks", "attn_mask", "cu_seqlens_q", "cu_seqlens_k",
    "block_table", "seqused_k", "cache_batch_idx", "cache_leftpad", "q_pos0", "k_pos0", "k_scale", "v_scale",
    "partial_out", "partial_lse",
)  # fmt: skip
_STRIDES = (
    "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head",
    "out_batch", "out_row", "out_head", "lse_batch", "lse_head",
    "mask_batch", "mask_head", "mask_row", "mask_key",
)  # fmt: skip
_INTS = (
    "batch", "first_batch", "heads", "kv_heads", "head_dim", "v_head_dim", "q_rows", "max_seqlen_q", "k_rows",
    "k_batches", "max_pages", "page_rows", "page_magic", "page_shift", "alibi_batch", "mask_kind", "left",
    "right", "splits", "partial_width",
)  # fmt: skip
_FAR = 1 << 29  # FAR of attention.cuh
_MASK_KINDS = {torch.bool: 1, torch.float16: 2, torch.float32: 3}
GRID_LIMIT = 65535  # blocks along y and z
_ROW_LIMIT = 1 << 29  # rows are 32-bit integers on the device


class AttentionParams(ctypes.Structure):
    """``struct AttentionParams``; pointers are addresses, 0 for None."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in _INTS),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


class AttentionCall(NamedTuple):
    """One attention call: the fields of the kernels' library, in the meaning of FlashAttention's interface.

    float16 tensors with unit stride in the last dimension; index tensors are int32 and contiguous, ``scale``
    tensors, slopes and sinks float32 and contiguous, all on one device.
    """

    q: Tensor  # (B, Sq, H, D) | packed (total_q, H, D)
    k: Tensor  # (B, Sk, Hkv, D) | packed (total_k, Hkv, D) | pages (P, page, Hkv, D)
    v: Tensor  # as k, with Dv for D
    scale: float
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)  # (left, right), None: unbounded
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # (H,) | (B, H)
    sinks: Tensor | None = None  # (H,)
    attn_mask: Tensor | None = None  # (B, H, Sq, keys), bool, float16 or float32; strides may be 0
    cu_seqlens_q: Tensor | None = None  # (B + 1,)
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0  # upper bounds of packed lengths
    max_seqlen_k: int = 0
    block_table: Tensor | None = None  # (B, max_pages)
    seqused_k: Tensor | None = None  # (B,)
    cache_batch_idx: Tensor | None = None  # (B,)
    cache_leftpad: Tensor | None = None  # (B,)
    q_pos0: Tensor | None = None  # (B,)
    k_pos0: Tensor | None = None  # (B,)
    k_scale: Tensor | None = None  # (Hkv,)
    v_scale: Tensor | None = None  # (Hkv,)
    return_lse: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def longest_q(self) -> int:
        """Upper bound of the queries of a sequence."""
        return self.q.shape[1] if self.cu_seqlens_q is None else min(self.max_seqlen_q, self.q.shape[0])

    @property
    def longest_k(self) -> int:
        """Upper bound of the keys of a sequence, from shapes alone."""
        if self.block_table is not None:
            return self.block_table.shape[1] * self.k.shape[1]
        if self.cu_seqlens_k is not None:
            return min(self.max_seqlen_k, self.k.shape[0])
        return self.k.shape[1]

    def signature(self) -> tuple[Hashable, ...]:
        """All but addresses and values: calls of equal signature differ only in their pointers."""
        return tuple((t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t for t in self)

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor that a kernel may read."""
        return tuple(t for t in self if isinstance(t, Tensor))


def new_results(c: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse): (.., H, Dv) float16 and float32 (B, H, Sq) | (H, total_q), empty unless asked for.

    Rows of packed queries that belong to no sequence see no key: they are 0 and -inf already.
    """
    shape = (*c.q.shape[:-1], c.v.shape[-1])
    lse_shape = (*c.q.shape[:-3], c.q.shape[-2], c.q.shape[-3]) if c.return_lse else (0,)
    if c.cu_seqlens_q is None:
        return c.q.new_empty(shape), c.q.new_empty(lse_shape, dtype=torch.float32)
    return c.q.new_zeros(shape), c.q.new_full(lse_shape, -torch.inf, dtype=torch.float32)


# The checked parameters of signatures seen before, pointers aside: models repeat theirs in every layer.
_known: dict[tuple[Hashable, ...], bytes] = {}
_MOST_KNOWN = 4096


def attention_params(c: AttentionCall, out: Tensor, lse: Tensor) -> AttentionParams:
    """The kernels' view of a call, ``out`` and ``lse`` its `new_results`.

    Raises ValueError that names what the kernels cannot take.
    """
    signature = c.signature()
    known = _known.get(signature)
    if known is None:
        check(c)
        if len(_known) == _MOST_KNOWN:
            _known.clear()
        known = _known[signature] = bytes(_without_pointers(c, out, lse))
    p = AttentionParams.from_buffer_copy(known)
    for name, t in zip(c._fields, c, strict=True):
        if isinstance(t, Tensor):
            setattr(p, name, t.data_ptr())
    p.out = out.data_ptr()
    if c.return_lse:
        p.lse = lse.data_ptr()
    return p


def _without_pointers(c: AttentionCall, out: Tensor, lse: Tensor) -> AttentionParams:
    p = AttentionParams()
    packed_q, packed_k = c.q.ndim == 3, c.k.ndim == 3
    for name, t, packed in (
        ("q", c.q, packed_q),
        ("k", c.k, packed_k),
        ("v", c.v, packed_k),
        ("out", out, packed_q),
    ):
        batch, row, head = (0, *t.stride()[:2]) if packed else t.stride()[:3]
        setattr(p, f"{name}_batch", batch)
        setattr(p, f"{name}_row", row)
        setattr(p, f"{name}_head", head)
    if c.return_lse:
        p.lse_batch, p.lse_head = (0, lse.stride(0)) if packed_q else lse.stride()[:2]
    if c.attn_mask is not None:
        p.mask_batch, p.mask_head, p.mask_row, p.mask_key = c.attn_mask.stride()
        p.mask_kind = _MASK_KINDS[c.attn_mask.dtype]
    p.batch, p.heads, p.kv_heads = c.batch, c.q.shape[-2], c.k.shape[-2]
    p.head_dim, p.v_head_dim = c.q.shape[-1], c.v.shape[-1]
    p.q_rows, p.max_seqlen_q = c.q.shape[-3], c.longest_q
    p.k_batches = 1 if packed_k else c.k.shape[0]
    p.k_rows = c.k.shape[-3] if p.k_batches else 0  # whatever the indices say, an empty cache has no row
    if c.block_table is not None:
        p.max_pages = c.block_table.shape[1]
        p.page_rows = _page_rows(c)
        page = max(p.k_rows, 1)
        p.page_shift = (page - 1).bit_length()
        p.page_magic = -(-(1 << (31 + p.page_shift)) // page)
    if c.alibi_slopes is not None and c.alibi_slopes.ndim == 2:
        p.alibi_batch = c.alibi_slopes.stride(0)
    left, right = c.window[0], 0 if c.causal else c.window[1]
    p.left = -1 if left is None else min(left, _FAR)
    p.right = -1 if right is None else min(right, _FAR)
    p.scale, p.softcap = c.scale, c.softcap
    return p


def _page_rows(c: AttentionCall) -> int:
    """Rows from the start of a page to the next; 0 if k and v differ, or if that is no whole number."""
    (k_page, k_row), (v_page, v_row) = c.k.stride()[:2], c.v.stride()[:2]
    if not k_row or not v_row or k_page % k_row or k_page * v_row != v_page * k_row:
        return 0
    rows = k_page // k_row
    return rows if rows * c.k.shape[0] < 1 << 31 else 0


def check(c: AttentionCall) -> None:
    """Raises ValueError naming the first argument that the kernels cannot take."""
    expect_device(c.q, **{name: t for name, t in c._asdict().items() if isinstance(t, Tensor)})
    for name, t in (("q", c.q), ("k", c.k), ("v", c.v)):
        expect_half(name, t)
        if not 1 <= t.shape[-1] <= 256:
            raise ValueError(f"{name}: head_dim {t.shape[-1]}, expected 1..256")
    batch, heads, kv_heads = c.batch, c.q.shape[-2], c.k.shape[-2]
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"k: {kv_heads} heads, expected a divisor of q's {heads}")
    if heads > GRID_LIMIT:
        raise ValueError(f"q: {heads} heads, expected at most {GRID_LIMIT}")
    if c.k.shape[:-1] != c.v.shape[:-1] or c.k.shape[-1] != c.q.shape[-1]:
        raise ValueError(
            f"q, k, v: {tuple(c.q.shape)}, {tuple(c.k.shape)}, {tuple(c.v.shape)} do not fit together"
        )
    rows = c.block_table is None and c.cu_seqlens_k is None and c.cache_batch_idx is None
    if rows and c.k.shape[0] != batch:
        raise ValueError(f"k: batch {c.k.shape[0]}, q has {batch}")
    for name in ("seqused_k", "cache_batch_idx", "cache_leftpad", "q_pos0", "k_pos0"):
        _expect(name, getattr(c, name), torch.int32, batch)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        _expect(name, getattr(c, name), torch.int32, batch + 1)
    _expect("block_table", c.block_table, torch.int32, batch, -1)
    each = c.alibi_slopes is not None and c.alibi_slopes.ndim == 2
    _expect("alibi_slopes", c.alibi_slopes, torch.float32, *((batch,) if each else ()), heads)
    _expect("sinks", c.sinks, torch.float32, heads)
    _expect("k_scale", c.k_scale, torch.float32, kv_heads)
    _expect("v_scale", c.v_scale, torch.float32, kv_heads)
    if max(c.q.shape[-3], c.longest_k) > _ROW_LIMIT:
        raise ValueError(f"q, k: {c.q.shape[-3]} and {c.longest_k} rows, expected at most {_ROW_LIMIT}")
    if c.attn_mask is not None:
        if c.attn_mask.dtype not in _MASK_KINDS:
            raise ValueError(f"attn_mask: {c.attn_mask.dtype}, expected bool, float16 or float32")
        shape = (batch, heads, c.longest_q, c.longest_k)
        if c.q.ndim == 3 or c.k.ndim == 3 or tuple(c.attn_mask.shape) != shape:
            raise ValueError(
                f"attn_mask: {tuple(c.attn_mask.shape)}, expected {shape} of sequences not packed"
            )


def _expect(name: str, t: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    """Raises ValueError unless ``t`` is None, or contiguous and of this dtype and shape (-1: any size)."""
    if t is not None:
        expect(name, t, shape, dtype)
        if not t.is_contiguous():
            raise ValueError(f"{name}: strides {t.stride()}, expected contiguous")


def aligned(c: AttentionCall) -> bool:
    """Whether every row of q, k and v can be read 16 bytes at a time."""
    return in_octets(c.q, c.k, c.v) and not (c.q.shape[-1] | c.v.shape[-1]) % 8
