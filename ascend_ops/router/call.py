"""One attention call as the router sees it, and the lengths that CANN wants on the host."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class AttentionCall(NamedTuple):
    """``softmax(mask(softcap(scale * q @ k^T) + alibi + attn_mask), sinks) @ v``.

    Query i of a sequence has position ``i + Sk - Sq`` and sees keys from ``position - left`` to
    ``position + right``; None: unbounded. ``attn_mask`` is bool (True: keep) or additive.
    """

    q: Tensor  # (B, Sq, H, D) | packed (total_q, H, D)
    k: Tensor  # (B, Sk, Hkv, D) | packed (total_k, Hkv, D) | pages (P, page, Hkv, D)
    v: Tensor
    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None  # float32 (H,)
    attn_mask: Tensor | None = None  # (B, H, Sq, Sk), broadcast dimensions with stride 0
    cu_seqlens_q: Tensor | None = None  # int32 (B + 1,)
    cu_seqlens_k: Tensor | None = None
    block_table: Tensor | None = None  # int32 (B, max_pages)
    seqused_k: Tensor | None = None  # int32 (B,)
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    q_pos0: Tensor | None = None
    k_pos0: Tensor | None = None
    kv_layout: str = "nhd"  # "npu_nz": the storage of each page is (Hkv * D / 16, page, 16)
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    return_lse: bool = False

    def given(self, names: tuple[str, ...]) -> list[str]:
        """Those of these optional fields that are set."""
        values = {n: getattr(self, n) for n in names}
        return [n for n, v in values.items() if isinstance(v, Tensor) or v not in (None, 0.0)]

    @property
    def heads(self) -> int:
        return self.q.shape[-2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[-2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]

    @property
    def v_head_dim(self) -> int:
        return self.v.shape[-1]

    @property
    def page_size(self) -> int:
        return 0 if self.block_table is None else self.k.shape[1]


class Lengths(NamedTuple):
    """Queries and keys of each sequence."""

    q: tuple[int, ...]
    k: tuple[int, ...]

    def unseen(self, right: int | None) -> tuple[int, ...]:
        """How many of each sequence's first queries see no key: their band ends before the first one."""
        return tuple(
            sq if not sk else 0 if right is None else max(0, min(sq, sq - sk - right))
            for sq, sk in zip(self.q, self.k, strict=True)
        )


def lengths(call: AttentionCall) -> Lengths:
    """The lengths of a call; reads those that are on a device once per tensor and version."""
    if call.cu_seqlens_q is None:
        q = (call.q.shape[1],) * call.q.shape[0]
    else:
        q = _differences(host(call.cu_seqlens_q))
    if call.seqused_k is not None:
        k = host(call.seqused_k)
    elif call.cu_seqlens_k is not None:
        k = _differences(host(call.cu_seqlens_k))
    else:
        k = (call.k.shape[1],) * len(q)
    return Lengths(q, k)


def on_device(call: AttentionCall) -> bool:
    """Whether the lengths are on a device: known or not, a graph must not keep them as constants."""
    needed = (call.cu_seqlens_q, call.cu_seqlens_k, call.seqused_k)
    return any(t is not None and t.device.type != "cpu" for t in needed)


# A forward passes the same tensors to every layer: one synchronisation then serves them all.
_values = WeakTensorKeyDictionary()  # tensor: (version, values)


def _known(t: Tensor) -> tuple[int, ...] | None:
    if t.is_inference():  # has no version, which would tell a change
        return None
    version, values = _values.get(t, (None, None))
    return values if version == t._version else None  # noqa: SLF001


def host(t: Tensor) -> tuple[int, ...]:
    """The values of a small integer tensor."""
    values = _known(t)
    if values is None:
        values = tuple(t.tolist())
        if not t.is_inference():
            _values[t] = (t._version, values)  # noqa: SLF001
    return values


def _differences(cumulative: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(b - a for a, b in pairwise(cumulative))


def zero_unseen(out: Tensor, lse: Tensor | None, lens: Lengths, right: int | None) -> None:
    """Rows without a visible key become 0 and -inf, in place; ``out`` (T, H, D) and ``lse`` (H, T)."""
    start = 0
    for rows, count in zip(lens.q, lens.unseen(right), strict=True):
        if count:
            out[start : start + count] = 0.0
            if lse is not None:
                lse[:, start : start + count] = -torch.inf
        start += rows
    if start < out.shape[0]:  # past the last sequence
        out[start:] = 0.0
        if lse is not None:
            lse[:, start:] = -torch.inf
