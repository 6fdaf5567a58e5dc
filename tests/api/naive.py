"""A second oracle, written from the contract's words alone: one query, one head, one key at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, o: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) float64 of the arguments of `fastattn.attention`: (rows, H, Dv) and (rows, H), packed."""
    numbers = {
        n: x.double().numpy() if n in FLOATS else x.numpy() for n, x in o.items() if isinstance(x, Tensor)
    }
    heads, head_dim = q.shape[-2:]
    kv_heads = k.shape[-2]
    qs, ks, vs = (t.double().numpy() for t in (q, k, v))
    if "cu_seqlens_q" in o:
        cu = numbers["cu_seqlens_q"]
        queries = [qs[cu[b] : cu[b + 1]] for b in range(len(cu) - 1)]
    else:
        queries = list(qs)
    outs, lses = [], []
    for b, rows in enumerate(queries):
        keys, values, skipped = _keys(ks, vs, b, o, numbers)
        for i, row in enumerate(rows):
            for h in range(heads):
                kv = h // (heads // kv_heads)
                scores = [
                    _score(
                        row[h], keys[j][kv], i, j, h, b, len(rows), len(keys), skipped, head_dim, o, numbers
                    )
                    for j in range(len(keys))
                ]
                terms = list(scores)
                if "sinks" in o:
                    terms.append(float(numbers["sinks"][h]))
                top = max(terms, default=-math.inf)
                if top == -math.inf:
                    outs.append(np.zeros(v.shape[-1]))
                    lses.append(-math.inf)
                    continue
                total = sum(math.exp(t - top) for t in terms)
                weights = [math.exp(s - top) / total for s in scores]
                outs.append(sum((w * values[j][kv] for j, w in enumerate(weights)), np.zeros(v.shape[-1])))
                lses.append(top + math.log(total))
    shape = (-1, heads)
    return np.array(outs).reshape(*shape, v.shape[-1]), np.array(lses).reshape(shape)


FLOATS = ("alibi_slopes", "sinks")


def _keys(ks, vs, b, o, numbers):  # type: ignore[no-untyped-def]
    """Keys and values that sequence b has, and how many cache rows precede the first."""
    if "block_table" in o:
        page = ks.shape[1]
        pages = numbers["block_table"][b]
        locate = [(pages[r // page], r % page) for r in range(len(pages) * page)]
        rows_k, rows_v = [ks[at] for at in locate], [vs[at] for at in locate]
    elif "cu_seqlens_k" in o:
        lo, hi = numbers["cu_seqlens_k"][b : b + 2]
        rows_k, rows_v = list(ks[lo:hi]), list(vs[lo:hi])
    else:
        home = numbers["cache_batch_idx"][b] if "cache_batch_idx" in o else b
        rows_k, rows_v = list(ks[home]), list(vs[home])
    used = o.get("cache_seqlens", len(rows_k))
    used = used if isinstance(used, int) else int(used[b])
    first = int(numbers["cache_leftpad"][b]) if "cache_leftpad" in o else 0
    return rows_k[first:used], rows_v[first:used], first


def _score(q, k, i, j, h, b, q_len, k_len, skipped, head_dim, o, numbers):  # type: ignore[no-untyped-def]
    """The score of key j for query i, -inf when it is hidden."""
    key = j + (int(numbers["k_pos0"][b]) if "k_pos0" in o else 0)
    query = i + key - j + k_len - q_len
    if "q_pos0" in o:
        query = i + int(numbers["q_pos0"][b])
    left, right = (None if side in (None, -1) else side for side in o.get("window", (None, None)))
    if o.get("causal"):
        right = 0
    if (left is not None and key < query - left) or (right is not None and key > query + right):
        return -math.inf
    scale = o.get("scale")
    s = float(np.dot(q, k)) * (1 / math.sqrt(head_dim) if scale is None else scale)
    cap = o.get("softcap", 0.0)
    if cap:
        s = cap * math.tanh(s / cap)
    if "alibi_slopes" in o:
        slopes = numbers["alibi_slopes"]
        s -= float(slopes[h] if slopes.ndim == 1 else slopes[b][h]) * abs(query - key)
    if "attn_mask" in o:
        mask = o["attn_mask"]
        at = (b, h, i, j + skipped)[4 - mask.ndim :]
        value = mask[tuple(0 if n == 1 else x for n, x in zip(mask.shape, at, strict=True))].item()
        if isinstance(value, bool):
            return s if value else -math.inf
        s += value
    return s
