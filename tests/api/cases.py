"""Random calls of `fastattn.attention`, two oracles' yardstick and the accuracy rule."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.attention import build_args
from fastattn.reference import sequence_kv
from fastattn.spec import AttentionArgs

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (1, 2, 3, 8, 16, 24, 31, 40, 64, 72, 80, 96, 100, 127, 128, 160, 192, 200, 256)
HEADS = ((1, 1), (2, 2), (4, 1), (4, 2), (6, 3), (5, 5), (8, 1), (9, 3), (7, 1))
#: How q, k and v lie in memory: what attention() accepts.
LAYOUTS = ("dense", "packed", "packed_q", "packed_k", "paged", "packed_paged", "rows", "cache")


class Case(NamedTuple):
    """Positional and keyword arguments of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def args(self) -> AttentionArgs:
        return build_args(self.q, self.k, self.v, **self.options)

    def limited_to(self, features: frozenset[str]) -> Case:
        """The same call without the options that a kernel of ``features`` would refuse."""
        names = {"cache_seqlens": "seqused_k"}
        needed = {"cu_seqlens_q", "cu_seqlens_k", "block_table", "max_seqlen_q", "max_seqlen_k", "scale"}
        kept = {n: o for n, o in self.options.items() if n in needed or names.get(n, n) in features}
        return self._replace(options=kept)

    def __str__(self) -> str:
        options = {n: tuple(o.shape) if isinstance(o, Tensor) else o for n, o in self.options.items()}
        return (
            f"{self.q.dtype} q{tuple(self.q.shape)} k{tuple(self.k.shape)} v{tuple(self.v.shape)} {options}"
        )


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Normal values; half of the time a view into something wider, or with its heads before its rows."""
    kind = rng.choice(("contiguous", "contiguous", "wide", "heads_first", "steps"))
    if kind == "wide":
        wide = torch.randn((*shape[:-1], shape[-1] + 5), generator=g).to(dtype)
        return wide[..., 3 : 3 + shape[-1]]
    if kind == "heads_first":
        return (
            torch.randn((*shape[:-3], shape[-2], shape[-3], shape[-1]), generator=g)
            .to(dtype)
            .transpose(-2, -3)
        )
    if kind == "steps":
        return torch.randn((*shape[:-1], 2 * shape[-1]), generator=g).to(dtype)[..., ::2]
    return torch.randn(shape, generator=g).to(dtype)


def random_case(seed: int, layout: str, dtype: torch.dtype, head_dim: int) -> Case:
    """One call with a random subset of everything the layout allows; the same for the same arguments."""
    rng = random.Random(f"{seed} {layout} {dtype} {head_dim}")  # noqa: S311
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    heads, kv_heads = rng.choice(HEADS)
    v_dim = rng.choice((head_dim, head_dim, rng.choice(HEAD_DIMS)))
    batch = rng.choice((1, 2, 3))
    longest = rng.choice((1, 5, 17, 64, 150))
    lengths_k = [rng.choice((0, 1, longest, rng.randint(0, longest))) for _ in range(batch)]
    lengths_q = [rng.choice((0, 1, n, rng.randint(0, longest))) for n in lengths_k]
    o: dict[str, Any] = {}

    q_len, k_len = max(lengths_q), max(lengths_k)
    if layout in ("dense", "rows", "cache", "packed_q") and rng.random() < 0.9:
        q_len, k_len = max(q_len, 1), max(k_len, 1)
    if layout in ("packed", "packed_q", "packed_paged"):
        o["cu_seqlens_q"] = cumulative(lengths_q)
        if rng.random() < 0.5:
            o["max_seqlen_q"] = q_len
        q = strided(rng, (sum(lengths_q), heads, head_dim), dtype, g)
    else:
        q = strided(rng, (batch, q_len, heads, head_dim), dtype, g)

    kv_shape: tuple[int, ...] = (batch, k_len, kv_heads)
    if layout in ("packed", "packed_k"):
        o["cu_seqlens_k"] = cumulative(lengths_k)
        if rng.random() < 0.5:
            o["max_seqlen_k"] = k_len
        kv_shape = (sum(lengths_k), kv_heads)
    elif layout in ("paged", "packed_paged"):
        page = rng.choice((1, 3, 16, 16, 64))
        per_sequence = max(1, -(-k_len // page)) + rng.randint(0, 1)
        pages = batch * per_sequence + 2
        order = rng.sample(range(pages), batch * per_sequence)
        o["block_table"] = int32(order).view(batch, per_sequence)
        o["cache_seqlens"] = int32(lengths_k)
        kv_shape = (pages, page, kv_heads)
    elif layout == "rows":
        o["cache_batch_idx"] = int32(rng.sample(range(batch + 2), batch))
        kv_shape = (batch + 2, k_len, kv_heads)
    if layout in ("cache", "rows", "packed_q"):
        present = [min(n, k_len) for n in lengths_k]
        uniform = rng.random() < 0.3
        o["cache_seqlens"] = present[0] if uniform else int32(present)
        lengths_k = [present[0]] * batch if uniform else present
    k = strided(rng, (*kv_shape, head_dim), dtype, g)
    v = strided(rng, (*kv_shape, v_dim), dtype, g)

    def maybe(p: float) -> bool:
        return rng.random() < p

    if layout in ("cache", "rows", "paged", "packed_paged") and maybe(0.4):
        o["cache_leftpad"] = int32([rng.randint(0, n) for n in lengths_k])
    if "cache_seqlens" in o:
        poison_absent(k, v, o)
    o["causal"] = maybe(0.5)
    if maybe(0.4):
        o["window"] = (rng.choice((None, -1, 0, 3, 40)), rng.choice((None, -1, 0, 2, 40)))
    if maybe(0.2):
        o["softcap"] = rng.choice((1.0, 15.0, 50.0))
    if maybe(0.3):
        shape = (heads,) if maybe(0.5) else (batch, heads)
        o["alibi_slopes"] = torch.rand(shape, generator=g) * 0.5
    if maybe(0.25):
        o["sinks"] = torch.randn((heads,), generator=g)
    if maybe(0.3):
        o["scale"] = rng.choice((0.25, 1.0, 0.05))
    if maybe(0.2):
        o["k_pos0"] = int32([rng.randint(0, 30) for _ in range(batch)])
    if maybe(0.2):
        o["q_pos0"] = int32([rng.randint(0, 60) for _ in range(batch)])
    if "cu_seqlens_q" not in o and "cu_seqlens_k" not in o and maybe(0.35):
        rows = o["block_table"].shape[1] * kv_shape[1] if "block_table" in o else k_len
        full = (batch, heads, q_len, rows)
        cut = tuple(n if maybe(0.6) else 1 for n in full)[rng.choice((0, 0, 2)) :]
        keep = torch.rand(cut, generator=g) > 0.3
        bias = torch.randn(cut, generator=g)
        kind = rng.choice(("bool", "float", "float_inf"))
        o["attn_mask"] = (
            keep
            if kind == "bool"
            else (bias if kind == "float" else bias.masked_fill(~keep, -torch.inf)).to(
                rng.choice((torch.float32, dtype))
            )
        )
    o["return_lse"] = maybe(0.4)
    return Case(q, k, v, o)


def poison_absent(k: Tensor, v: Tensor, o: dict[str, Any]) -> None:
    """NaN into every cache row that no sequence has: uninitialised memory must not reach a result."""
    present = torch.zeros(k.shape[:2], dtype=torch.bool)
    page = k.shape[1]
    batch = next((o[n].shape[0] for n in ("block_table", "cache_batch_idx") if n in o), k.shape[0])
    used = o["cache_seqlens"] if isinstance(o["cache_seqlens"], Tensor) else [o["cache_seqlens"]] * batch
    for b, n in enumerate(used):
        first = int(o["cache_leftpad"][b]) if "cache_leftpad" in o else 0
        rows = torch.arange(first, int(n))
        if "block_table" in o:
            present[o["block_table"][b].long()[rows // page], rows % page] = True
        else:
            present[int(o["cache_batch_idx"][b]) if "cache_batch_idx" in o else b, rows] = True
    k[~present] = torch.nan
    v[~present] = torch.nan


def cumulative(lengths: list[int]) -> Tensor:
    return torch.nn.functional.pad(int32(lengths).cumsum(0, dtype=torch.int32), (1, 0))


def torch_math(a: AttentionArgs, split_scale: bool = False) -> tuple[Tensor, Tensor]:
    """(out, lse) as plain torch in q's dtype would compute them, head by repeated head.

    The yardstick of the accuracy rule: every intermediate is rounded to the dtype, as an eager model's is.
    ``split_scale`` puts the scale's square root on q and on k, as the math path of torch's SDPA does.
    """
    batch = a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.numel() - 1
    out = a.q.new_zeros((*a.q.shape[:-1], a.v.shape[-1]))
    lse = torch.full(a.q.shape[:-1], -torch.inf)
    group = a.q.shape[-2] // a.k.shape[-2]
    for b in range(batch):
        rows = b if a.cu_seqlens_q is None else slice(*a.cu_seqlens_q[b : b + 2].tolist())
        q = a.q[rows].transpose(0, 1)
        k, v = (t.to(a.q.dtype).transpose(0, 1).repeat_interleave(group, 0) for t in sequence_kv(a, b))
        if not q.shape[1]:
            continue
        root = a.scale**0.5
        s = matmul(q * root, (k * root).mT) if split_scale else matmul(q, k.mT) * a.scale
        if a.softcap:
            s = torch.tanh(s / a.softcap) * a.softcap
        first_k = 0 if a.k_pos0 is None else int(a.k_pos0[b])
        first_q = first_k + k.shape[1] - q.shape[1] if a.q_pos0 is None else int(a.q_pos0[b])
        distance = (torch.arange(first_q, first_q + q.shape[1])[:, None]
                    - torch.arange(first_k, first_k + k.shape[1])[None])  # fmt: skip
        if a.alibi_slopes is not None:
            slopes = a.alibi_slopes if a.alibi_slopes.ndim == 1 else a.alibi_slopes[b]
            s = s - (slopes[:, None, None] * distance.abs()).to(s.dtype)
        if a.attn_mask is not None:
            lo = 0 if a.cache_leftpad is None else int(a.cache_leftpad[b])
            mask = a.attn_mask[b, ..., lo : lo + k.shape[1]]
            s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)
        left, right = a.bounds()
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None:
            hidden |= distance > left
        if right is not None:
            hidden |= -distance > right
        s = s.masked_fill(hidden, -torch.inf)
        if a.sinks is not None:
            s = torch.cat((s, a.sinks.to(s.dtype)[:, None, None].expand(-1, q.shape[1], 1)), -1)
        if not s.shape[-1]:
            continue
        p = torch.softmax(s, -1).nan_to_num(0.0)[..., : k.shape[1]]
        out[rows] = matmul(p, v).transpose(0, 1)
        lse[rows] = s.float().logsumexp(-1).transpose(0, 1)
    return out, lse.transpose(-1, -2)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` rounded to its dtype; float16 goes through float32, where torch has no slow GEMM."""
    return x @ y if x.dtype != torch.float16 else (x.float() @ y.float()).half()


def assert_accurate(ours: Tensor, yardstick: Tensor, exact: Tensor, what: object) -> None:
    """``err(ours) <= 2 * err(torch in the same dtype) + eps``, eps one rounding of the largest value."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert not ours.isnan().any(), f"{what}: NaN"
    unseen = exact == -torch.inf
    assert torch.equal(ours == -torch.inf, unseen), f"{what}: -inf in other places than the oracle"
    if not ours.numel():
        return
    seen = exact.masked_fill(unseen, 0.0)
    err = (ours.double().masked_fill(unseen, 0.0) - seen).abs().max()
    allowed = (yardstick.double().masked_fill(unseen, 0.0) - seen).abs().max()
    eps = torch.finfo(ours.dtype).eps * max(1.0, float(seen.abs().max()))
    assert err <= 2 * allowed + eps, f"{what}: error {err:.2e}, torch's {allowed:.2e}, eps {eps:.2e}"
