"""Where a sequence's queries and keys lie, and how their positions relate.

Lengths, page tables and row indices live on the device. Each is clamped to what its tensor holds: a wrong
one gives wrong numbers, never an access out of bounds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .maths import clamp


@triton.jit
def query_span(cu_q, b, max_q, total_q):
    """First row and number of queries of sequence ``b``."""
    if cu_q is None:
        first = 0
        length = max_q
    else:
        first = clamp(tl.load(cu_q + b), 0, total_q)
        length = clamp(tl.load(cu_q + b + 1), first, total_q) - first
    return first, length


@triton.jit
def key_span(cu_k, used, leftpad, b, kv_len):
    """First row and number of valid keys of sequence ``b``, and the index of that row in its storage."""
    if cu_k is None:
        base = 0
        end = kv_len
    else:
        base = clamp(tl.load(cu_k + b), 0, kv_len)
        end = clamp(tl.load(cu_k + b + 1), base, kv_len) - base
    if used is not None:
        end = clamp(tl.load(used + b), 0, end)
    first = 0
    if leftpad is not None:
        first = clamp(tl.load(leftpad + b), 0, end)
    return base + first, end - first, first


@triton.jit
def diagonal(q_pos0, k_pos0, b, q_len, k_len):
    """Position of query 0 less that of key 0: bottom-right aligned unless told."""
    offset = (k_len - q_len).to(tl.int64)
    if q_pos0 is not None:
        offset = tl.load(q_pos0 + b).to(tl.int64)
        if k_pos0 is not None:
            offset -= tl.load(k_pos0 + b).to(tl.int64)
    return offset
