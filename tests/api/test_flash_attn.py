"""The flash_attn drop-ins: exact signatures, semantics, in-place KV cache, refusals, and a swapped import."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn import UnsupportedError, flash_attn

from .cases import cumulative, int32

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {TAIL}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}",
    "flash_attn_varlen_func": (
        f"q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL}, block_table=None"
    ),
    "flash_attn_varlen_kvpacked_func": (
        f"q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL}"
    ),
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
        " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
        " return_softmax_lse=False"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    parameters = inspect.signature(getattr(fastattn, name)).parameters.values()
    empty = inspect.Parameter.empty
    ours = ", ".join(p.name if p.default is empty else f"{p.name}={p.default!r}" for p in parameters)
    assert ours == SIGNATURES[name]


# ------------------------------------------------------------------------------- an independent expectation
def expected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out (Sq, H, D), lse (H, Sq)) float64 of one sequence, from flash_attn's documentation."""
    q_len, heads, head_dim = q.shape
    k_len = k.shape[0]
    k, v = (t.double().repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    s = torch.einsum("ihd,jhd->hij", q.double(), k) * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(q_len)[:, None] + k_len - q_len, torch.arange(k_len)[None]
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * (i - j).abs()
    left, right = window[0], 0 if causal else window[1]
    visible = torch.ones(q_len, k_len, dtype=torch.bool)
    if left >= 0:
        visible &= j >= i - left
    if right >= 0:
        visible &= j <= i + right
    s = s.masked_fill(~visible, -torch.inf)
    p = torch.softmax(s, -1).nan_to_num(0.0)
    return torch.einsum("hij,jhd->ihd", p, v), s.logsumexp(-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (S, H, D) with each pair turned by its position's angle, as complex numbers."""
    half = cos.shape[1]
    turn = torch.complex(cos.double(), sin.double())[positions][:, None]
    head = x[..., : 2 * half].double()
    first, second = (
        (head[..., 0::2], head[..., 1::2]) if interleaved else (head[..., :half], head[..., half:])
    )
    z = torch.complex(first, second) * turn
    parts = (z.real, z.imag)
    out = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((out, x[..., 2 * half :].double()), -1)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-6)


OPTIONS = [
    pytest.param({}, id="full"),
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"window_size": (3, 0)}, id="window-3-0"),
    pytest.param({"window_size": (0, 2)}, id="window-0-2"),
    pytest.param({"window_size": (-1, 1)}, id="window-right"),
    pytest.param({"window_size": (4, -1), "causal": True}, id="window-causal"),
    pytest.param({"softcap": 5.0, "causal": True}, id="softcap"),
    pytest.param({"softmax_scale": 0.3}, id="scale"),
    pytest.param({"alibi": True, "causal": True}, id="alibi"),
    pytest.param({"alibi": True}, id="alibi-both-sides"),
]


def split(options: dict, heads: int) -> tuple[dict, dict]:
    """The options as ours take them, and as `expected` does."""
    ours = {n: o for n, o in options.items() if n != "alibi"}
    theirs = {{"window_size": "window", "softmax_scale": "scale"}.get(n, n): o for n, o in ours.items()}
    if "alibi" in options:
        ours["alibi_slopes"] = theirs["slopes"] = 2.0 ** -torch.arange(1, heads + 1).float()
    return ours, theirs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 17), (5, 17), (17, 17), (17, 5)])
def test_func(q_len: int, k_len: int, options: dict) -> None:
    q, k, v = torch.randn(2, q_len, 6, 20), torch.randn(2, k_len, 3, 20), torch.randn(2, k_len, 3, 20)
    ours, theirs = split(options, 6)
    out = flash_attn.flash_attn_func(q, k, v, **ours)
    for b in range(2):
        close(out[b], expected(q[b], k[b], v[b], **theirs)[0])


def test_func_returns_lse() -> None:
    q, k, v = torch.randn(2, 7, 4, 16), torch.randn(2, 5, 2, 16), torch.randn(2, 5, 2, 16)
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert probs is None
    assert lse.dtype == torch.float32
    for b in range(2):
        exact, exact_lse = expected(q[b], k[b], v[b], causal=True)
        close(out[b], exact)
        close(lse[b], exact_lse)


def test_packed_variants_equal_the_plain_one() -> None:
    qkv = torch.randn(2, 9, 3, 4, 24)
    plain = flash_attn.flash_attn_func(*qkv.unbind(2), causal=True)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), plain)
    kvpacked = flash_attn.flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], causal=True)
    assert torch.equal(kvpacked, plain)


@pytest.mark.parametrize("options", OPTIONS)
def test_varlen(options: dict) -> None:
    q_lens, k_lens = [3, 0, 1, 8], [5, 4, 0, 6]
    q = torch.randn(sum(q_lens), 4, 12)
    kv = torch.randn(sum(k_lens), 2, 2, 12)
    ours, theirs = split(options, 4)
    cu = (cumulative(q_lens), cumulative(k_lens), 8, 6)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, *kv.unbind(1), *cu, **ours, return_attn_probs=True)
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, *cu, **ours), out)
    assert lse.shape == (4, 12)
    for b in range(4):
        rows, keys = (slice(*c[b : b + 2].tolist()) for c in cu[:2])
        exact, exact_lse = expected(q[rows], kv[keys, 0], kv[keys, 1], **theirs)
        close(out[rows], exact)
        close(lse[:, rows], exact_lse)


def test_varlen_qkvpacked() -> None:
    qkv, cu = torch.randn(11, 3, 4, 16), cumulative([4, 0, 7])
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 7, causal=True)
    for lo, hi in ((0, 4), (4, 11)):
        close(out[lo:hi], expected(*qkv[lo:hi].unbind(1), causal=True)[0])


def test_varlen_paged() -> None:
    q_lens, k_lens, page = [3, 1], [11, 6], 4
    q, k_pages, v_pages = torch.randn(4, 4, 16), torch.randn(7, page, 2, 16), torch.randn(7, page, 2, 16)
    table = int32([[5, 0, 3], [1, 6, 2]])
    out = flash_attn.flash_attn_varlen_func(
        q, k_pages, v_pages, cumulative(q_lens), cumulative(k_lens), 3, 11, causal=True, block_table=table
    )
    for b, rows in enumerate((slice(0, 3), slice(3, 4))):
        k, v = (t[table[b].long()].flatten(0, 1)[: k_lens[b]] for t in (k_pages, v_pages))
        close(out[rows], expected(q[rows], k, v, causal=True)[0])


# ------------------------------------------------------------------------------------------------ KV cache
def angles(rotary_dim: int, length: int = 64) -> tuple[Tensor, Tensor]:
    angle = torch.rand(length, rotary_dim // 2) * 2 * math.pi
    return angle.cos(), angle.sin()


HOMES = ["contiguous", "rows", "paged"]


@pytest.mark.parametrize("rotary", [None, "half", "interleaved"])
@pytest.mark.parametrize("mode", ["full", "causal", "window"])
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize(("q_len", "new"), [(1, 1), (3, 3), (2, 5), (4, 0)])
def test_kvcache(q_len: int, new: int, home: str, mode: str, rotary: str | None) -> None:
    """Append, rotate and attend equal the same steps done one sequence at a time on plain tensors."""
    batch, heads, kv_heads, head_dim, rotary_dim, capacity = 3, 4, 2, 24, 16, 20
    used = [7, 0, 12]
    q = torch.randn(batch, q_len, heads, head_dim)
    k, v = torch.randn(batch, new, kv_heads, head_dim), torch.randn(batch, new, kv_heads, head_dim)
    options = {"full": {}, "causal": {"causal": True}, "window": {"window_size": (6, 1)}}[mode]
    cos, sin = angles(rotary_dim)
    kwargs = dict(options)
    if rotary:
        kwargs |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary == "interleaved"}

    if home == "paged":
        table = torch.randperm(17)[:15].int().view(3, 5)
        shape, kwargs["block_table"] = (17, 4, kv_heads, head_dim), table
        homes = [(table[b].long()[:, None] * 4 + torch.arange(4)).flatten() for b in range(batch)]
    elif home == "rows":
        shape, kwargs["cache_batch_idx"] = (5, capacity, kv_heads, head_dim), int32([3, 0, 4])
        homes = [b * capacity + torch.arange(capacity) for b in (3, 0, 4)]
    else:
        shape = (batch, capacity, kv_heads, head_dim)
        homes = [b * capacity + torch.arange(capacity) for b in range(batch)]
    k_cache, v_cache = torch.randn(shape), torch.randn(shape)
    before_k, before_v = k_cache.clone().flatten(0, 1), v_cache.clone().flatten(0, 1)

    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=int32(used), **kwargs)

    after_k, after_v = before_k.double(), before_v.double()
    for b in range(batch):
        at = torch.arange(used[b], used[b] + max(new, q_len))
        q_b, k_b = q[b].double(), k[b].double()
        if rotary:
            # "all rotated to cache_seqlens" unless causal or local, where each query has its own position
            q_at = at[:1].expand(q_len) if mode == "full" else at[:q_len]
            q_b = rotated(q[b], cos, sin, q_at, rotary == "interleaved")
            k_b = rotated(k[b], cos, sin, at[:new], rotary == "interleaved")
        after_k[homes[b][at[:new]]] = k_b
        after_v[homes[b][at[:new]]] = v[b].double()
        keys = homes[b][: used[b] + new]
        theirs = {"causal": mode == "causal", "window": (6, 1) if mode == "window" else (-1, -1)}
        close(out[b], expected(q_b, after_k[keys], after_v[keys], **theirs)[0])
    # Written where they belong, and nothing else touched.
    close(k_cache.flatten(0, 1), after_k)
    assert torch.equal(v_cache.flatten(0, 1).double(), after_v)
    untouched = (after_v == before_v.double()).all(-1).all(-1)
    assert torch.equal(k_cache.flatten(0, 1)[untouched], before_k[untouched])


@pytest.mark.parametrize("causal", [False, True])
def test_kvcache_leftpad(causal: bool) -> None:
    """Keys before cache_leftpad do not exist; rotation still counts from the cache's first row."""
    used, pad = [9, 6], [4, 0]
    q, new = torch.randn(2, 2, 4, 16), torch.randn(2, 2, 2, 16)
    k_cache, v_cache = torch.randn(2, 16, 2, 16), torch.randn(2, 16, 2, 16)
    cos, sin = angles(16)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, new, new, cos, sin, cache_seqlens=int32(used), cache_leftpad=int32(pad),
        causal=causal, rotary_interleaved=False, return_softmax_lse=True,
    )  # fmt: skip
    for b in range(2):
        at = torch.arange(used[b], used[b] + 2)
        close(k_cache[b, at], rotated(new[b], cos, sin, at, False))
        q_b = rotated(q[b], cos, sin, at if causal else at[:1].expand(2), False)
        keys = slice(pad[b], used[b] + 2)
        exact, exact_lse = expected(q_b, k_cache[b, keys], v_cache[b, keys], causal=causal)
        close(out[b], exact)
        close(lse[b], exact_lse)


def test_kvcache_window_wider_than_the_cache_is_no_window() -> None:
    """flash_attn drops a bound that covers the whole cache, and then rotates queries as without a window."""
    q, new = torch.randn(1, 3, 2, 16), torch.randn(1, 3, 2, 16)
    cos, sin = angles(16)
    results = []
    for window in ((-1, -1), (20, 20), (20, -1)):
        caches = torch.zeros(1, 20, 2, 16), torch.zeros(1, 20, 2, 16)
        results.append(
            flash_attn.flash_attn_with_kvcache(
                q, *caches, new, new, cos, sin, cache_seqlens=4, window_size=window
            )
        )
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_kvcache_int_seqlens_equal_a_tensor() -> None:
    q, k_cache, v_cache = torch.randn(3, 1, 4, 16), torch.randn(3, 12, 2, 16), torch.randn(3, 12, 2, 16)
    one = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=7)
    other = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=int32([7, 7, 7]))
    assert torch.equal(one, other)
    close(one[1], expected(q[1], k_cache[1, :7], v_cache[1, :7])[0])


def test_kvcache_step_by_step_equals_one_prefill() -> None:
    """Ten decode steps with rotary give what one causal pass gives."""
    cos, sin = angles(16)
    qkv = torch.randn(2, 10, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    caches = torch.full((2, 12, 4, 16), torch.nan), torch.full((2, 12, 4, 16), torch.nan)
    steps = [
        flash_attn.flash_attn_with_kvcache(
            *(q[:, t : t + 1], *caches, k[:, t : t + 1], v[:, t : t + 1], cos, sin),
            cache_seqlens=t,
            causal=True,
        )
        for t in range(10)
    ]
    caches = torch.empty(2, 10, 4, 16), torch.empty(2, 10, 4, 16)
    whole = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cos, sin, cache_seqlens=0, causal=True)
    torch.testing.assert_close(torch.cat(steps, 1), whole)


# ------------------------------------------------------------------------------------------------ refusals
def qkv_cache() -> dict[str, Tensor]:
    shapes = {"q": (2, 3, 4, 16), "k_cache": (2, 8, 2, 16), "v_cache": (2, 8, 2, 16),
              "k": (2, 3, 2, 16), "v": (2, 3, 2, 16)}  # fmt: skip
    return {n: torch.randn(s) for n, s in shapes.items()}


def rotary_of(rotary_dim: int, length: int = 64) -> dict[str, Tensor]:
    return dict(zip(("rotary_cos", "rotary_sin"), angles(rotary_dim, length), strict=True))


TABLE = int32([[0], [1]])
BAD_KVCACHE = [
    ({"v": None, "cache_seqlens": 0}, "k and v: give both or neither"),
    ({"k": None, "cache_seqlens": 0}, "k and v: give both or neither"),
    ({}, "cache_seqlens: needed to append"),
    ({"cache_seqlens": 6}, r"k: rows 6\.\.8 of sequence 0 .* cache, which has 8 rows"),
    ({"cache_seqlens": int32([2, 6])}, r"rows 6\.\.8 of sequence 1"),
    ({"cache_seqlens": int32([2, -3])}, r"rows -3\.\.-1 of sequence 1"),
    ({"cache_seqlens": int32([0, 0]), "cache_batch_idx": int32([0, 2])}, "cache_batch_idx: 2 of sequence 1"),
    ({"cache_seqlens": int32([1]), "block_table": TABLE}, r"cache_seqlens: \(1,\), expected \(2,\)"),
    ({"cache_seqlens": 6, "block_table": TABLE}, r"k: rows 6\.\.8 .* block_table, which has 8 rows"),
    ({"cache_seqlens": 0, "block_table": int32([[0], [-1]])}, "block_table: -1 of sequence 1"),
    ({"cache_seqlens": 0, "block_table": int32([[0], [2]])}, "block_table: 2 of sequence 1"),
    ({"cache_seqlens": 0, "rotary_cos": angles(8)[0]}, "rotary_cos and rotary_sin: give both"),
    ({"cache_seqlens": 0, "k": None, "v": None} | rotary_of(8), "rotary_cos: needs"),
    ({"cache_seqlens": 0} | rotary_of(18), "cos, sin"),
    ({"cache_seqlens": 4, "causal": True} | rotary_of(8, length=6), "positions"),
    ({"cache_seqlens": 1 << 40}, r"cache_seqlens: 1099511627776, expected 0\.\."),
    ({"cache_seqlens": torch.tensor([0, 2**32])}, r"cache_seqlens: values 3\.\.4294967299"),
    ({"cache_seqlens": 0, "q": torch.tensor(1.0)}, r"q: 0 dimensions \(\), expected"),
    ({"cache_seqlens": 0, "k": torch.ones(3)}, r"k: 1 dimensions \(3,\), expected"),
    ({"cache_seqlens": 0, "v": torch.ones(3)}, r"v: 1 dimensions \(3,\), expected"),
    ({"cache_seqlens": 0, "k_cache": torch.tensor(1.0)}, "k_cache: 0 dimensions"),
    ({"cache_seqlens": 0, "k": torch.ones(2, 3, 1, 16)}, "k: "),
    ({"cache_seqlens": 0, "v": torch.ones(2, 2, 2, 16)}, "v: "),
    ({"cache_seqlens": 0, "v": torch.ones(2, 3, 2, 16).half()}, "v: torch.float16, v_cache is torch.float32"),
    ({"cache_seqlens": 0, "alibi_slopes": torch.ones(3)}, "alibi_slopes"),
    ({"cache_seqlens": 0, "softcap": -1.0}, "softcap"),
    ({"cache_seqlens": 0, "window_size": (-2, 0)}, "window"),
]


@pytest.mark.parametrize(("change", "message"), BAD_KVCACHE, ids=[m for _, m in BAD_KVCACHE])
def test_kvcache_refuses_and_leaves_the_cache(change: dict, message: str) -> None:
    call = qkv_cache() | change
    before = call["k_cache"].clone(), call["v_cache"].clone()
    with pytest.raises(ValueError, match=message):
        flash_attn.flash_attn_with_kvcache(**call)
    assert torch.equal(call["k_cache"], before[0])
    assert torch.equal(call["v_cache"], before[1])


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_kvcache_whose_rows_are_scattered_is_refused(name: str, backend: str) -> None:
    """Attention would read a copy that lacks the keys of this call."""
    cache = torch.zeros(2, 16, 2, 8).transpose(1, 3)
    call = qkv_cache() | {name: cache}
    wanted = rf"{name}: strides \(256, 1, 8, 16\), expected a contiguous last dimension"
    with fastattn.use_backend(backend), pytest.raises(ValueError, match=wanted):
        flash_attn.flash_attn_with_kvcache(**call, cache_seqlens=0)
    assert not cache.any()


def test_dropout_is_refused() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(UnsupportedError, match=r"dropout_p: 0\.1"):
        flash_attn.flash_attn_func(q, q, q, 0.1)
    with pytest.raises(UnsupportedError, match="dropout_p"):
        flash_attn.flash_attn_qkvpacked_func(torch.randn(1, 4, 3, 2, 8), dropout_p=0.5)
    cu = int32([0, 4])
    with pytest.raises(UnsupportedError, match="dropout_p"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 4, 4, dropout_p=1.0)


PLAIN = torch.ones(2, 4, 2, 8)
BAD_CALLS = {
    "qkvpacked": (lambda: flash_attn.flash_attn_qkvpacked_func(torch.ones(2, 4, 2, 2, 8)), "qkv: "),
    "kvpacked": (lambda: flash_attn.flash_attn_kvpacked_func(PLAIN, PLAIN), "kv: "),
    "head_dim": (lambda: flash_attn.flash_attn_func(PLAIN[..., :7], PLAIN, PLAIN), "k: head_dim 8, q has 7"),
    "heads": (lambda: flash_attn.flash_attn_func(torch.ones(2, 4, 3, 8), PLAIN, PLAIN), "k: 2 heads"),
    "dtype": (lambda: flash_attn.flash_attn_func(PLAIN.int(), PLAIN, PLAIN), "q: torch.int32"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------- a model written for flash_attn
MODEL = """
import torch
from torch import nn
from flash_attn import flash_attn_func, flash_attn_with_kvcache


class Block(nn.Module):
    def __init__(self, width=48, heads=6, kv_heads=2):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * self.head_dim)
        self.out = nn.Linear(width, width)

    def split(self, x):
        sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        return [t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv(x).split(sizes, -1)]

    def forward(self, x):
        q, k, v = self.split(x)
        return x + self.out(flash_attn_func(q, k, v, causal=True, window_size=(5, 0)).flatten(-2))

    def step(self, x, k_cache, v_cache, cache_seqlens):
        q, k, v = self.split(x)
        out = flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True, window_size=(5, 0)
        )
        return x + self.out(out.flatten(-2))
"""


def test_model_with_the_import_changed() -> None:
    """Its prefill equals its own token-by-token decode and the same block on torch's SDPA."""
    names: dict = {}
    exec(compile(MODEL.replace("from flash_attn import", "from fastattn import"), "model", "exec"), names)  # noqa: S102
    block: nn.Module = names["Block"]()
    x = torch.randn(2, 11, 48)
    with torch.inference_mode():
        whole = block(x)
        k_cache, v_cache = torch.zeros(2, 16, 2, 8), torch.zeros(2, 16, 2, 8)
        seqlens = int32([0, 0])
        steps = []
        for t in range(11):
            steps.append(block.step(x[:, t : t + 1], k_cache, v_cache, seqlens))
            seqlens += 1
        q, k, v = (t.transpose(1, 2) for t in block.split(x))
        i, j = torch.arange(11)[:, None], torch.arange(11)[None]
        plain = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=(j <= i) & (j >= i - 5), enable_gqa=True
        )
        plain = x + block.out(plain.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(whole, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(steps, 1), plain, atol=1e-5, rtol=1e-5)
