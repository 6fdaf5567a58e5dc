"""flash_attn's functions, with its signatures and semantics: change the import and the model runs.

Differences, both stated in the docstrings: nothing here has a backward pass or dropout (UnsupportedError),
and the log-sum-exp of a query that sees no key is -inf where flash_attn gives +inf.
Source of the signatures: flash_attn 2.8, ``flash_attn/flash_attn_interface.py``.
"""

from __future__ import annotations

from torch import Tensor

from .attention import Window, attention
from .flash_attn_cache import flash_attn_with_kvcache
from .spec import UnsupportedError

Result = Tensor | tuple[Tensor, Tensor, None]

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (B, Sq, H, D) over k, v (B, Sk, Hkv, D); causal is bottom-right aligned.

    Returns out (B, Sq, H, Dv), or with ``return_attn_probs`` (out, lse (B, H, Sq) float32, None): the
    probabilities exist only under dropout. ``deterministic`` concerns the backward pass.
    """
    _no_dropout(dropout_p)
    return _with_probs(
        attention(
            q, k, v, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            scale=softmax_scale, return_lse=return_attn_probs,
        )
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with kv (B, Sk, 2, Hkv, D)."""
    k, v = _unpack(kv, "kv", 2, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with qkv (B, S, 3, H, D)."""
    q, k, v = _unpack(qkv, "qkv", 3, 5)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Packed sequences: q (total_q, H, D), k and v (total_k, Hkv, D), int32 ``cu_seqlens`` (B + 1,).

    With ``block_table`` (B, max_pages), k and v are pages (P, page, Hkv, D) and ``cu_seqlens_k`` gives
    their lengths. ``return_attn_probs`` gives (out, lse (H, total_q), None).
    """
    _no_dropout(dropout_p)
    paged = block_table is not None
    return _with_probs(
        attention(
            q, k, v, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
            scale=softmax_scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=None if paged else cu_seqlens_k,
            max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, block_table=block_table,
            cache_seqlens=cu_seqlens_k.diff() if paged else None, return_lse=return_attn_probs,
        )
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with kv (total_k, 2, Hkv, D)."""
    k, v = _unpack(kv, "kv", 2, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with qkv (total, 3, H, D)."""
    q, k, v = _unpack(qkv, "qkv", 3, 4)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def _unpack(packed: Tensor, name: str, parts: int, ndim: int) -> tuple[Tensor, ...]:
    if packed.ndim != ndim or packed.shape[-3] != parts:
        raise ValueError(f"{name}: {tuple(packed.shape)}, expected {ndim} dimensions with {parts} at -3")
    return packed.unbind(-3)


def _no_dropout(dropout_p: float) -> None:
    if dropout_p:
        raise UnsupportedError(f"dropout_p: {dropout_p}; fastattn is an inference library, pass 0.0")


def _with_probs(result: Tensor | tuple[Tensor, Tensor]) -> Result:
    return result if isinstance(result, Tensor) else (*result, None)
