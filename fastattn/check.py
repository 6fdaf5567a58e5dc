"""`fastattn.check`: any call again, every op that it runs compared with the float64 oracle on a sample.

Fused operators of vendors have given plausible wrong answers (a mask ignored past 512 keys, a uniform average
where the layout lacked one): what a backend computes here and now can be looked at before it is relied on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ascend_ops.router.atb import plain_pages

from . import dispatch
from .check_ops import SAMPLES, Draw, Sample
from .spec import AttentionArgs, Op


class Finding(NamedTuple):
    """One comparison: the largest error, and its limit: twice plain torch's in the dtype, and a rounding."""

    op: str
    backend: str
    what: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


class Report(NamedTuple):
    """``result``: what the call returned. ``unchecked``: ops with nothing to compare, and how often."""

    result: Any
    findings: tuple[Finding, ...]
    unchecked: Counter[tuple[str, str]]

    @property
    def ok(self) -> bool:
        """Whether something was compared, and all of it is within its limit."""
        return bool(self.findings) and all(f.ok for f in self.findings)

    def __str__(self) -> str:
        lines = []
        for op, backend in sorted({(f.op, f.backend) for f in self.findings}):
            of = [f for f in self.findings if (f.op, f.backend) == (op, backend)]
            worst = max(of, key=lambda f: f.error / max(f.limit, 1e-300) if f.error == f.error else torch.inf)
            bad = sum(not f.ok for f in of)
            verdict = f"{bad} WRONG, " if bad else ""
            lines.append(
                f"{op} on {backend}: {len(of)} compared, {verdict}worst error {worst.error:.2e} of"
                f" {worst.limit:.2e} allowed ({worst.what})"
            )
        lines += [
            f"{op} on {backend}: {n} not compared" for (backend, op), n in sorted(self.unchecked.items())
        ]
        return "\n".join(lines) or "no op ran"


def check(call: Callable[..., Any], /, *args: Any, sample: Sample = Sample(), **kwargs: Any) -> Report:  # noqa: B008
    """Runs ``call(*args, **kwargs)`` and compares what its ops computed with the oracle.

        report = fastattn.check(fastattn.attention, q, k, v, causal=True)
        print(report, report.ok)
        fastattn.check(model.generate, ["Once upon a time"])

    Every op that fastattn dispatches meanwhile in this thread is compared, on the backend that ran it: a few
    sequences, heads and rows of it, in float64 on the CPU. The CPU's fused decoder makes way for single ops.
    Compiled functions (`torch.compile`, captured graphs) run unobserved.
    """
    observer = _Observer(sample)
    with dispatch.observed(observer):
        result = call(*args, **kwargs)
    return Report(result, tuple(observer.findings), observer.unchecked)


class _Observer:
    """Runs each op for `dispatch` and looks at its result."""

    def __init__(self, sample: Sample) -> None:
        self.draw = Draw(sample)
        self.findings: list[Finding] = []
        self.unchecked: Counter[tuple[str, str]] = Counter()

    def __call__(self, op: str, args: Any, backend: str, kernel: Op) -> Any:
        result = kernel.run(args)
        if op == "attention":
            self._attention(args, result, backend)
        else:
            compared = SAMPLES[op](args, result, self.draw) if op in SAMPLES else []
            for what, ours, plain, exact in compared:
                self._compare(op, backend, what, ours, plain, exact)
            if not compared:
                self.unchecked[backend, op] += 1
        return result

    def _compare(self, op: str, backend: str, what: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        if not exact.numel():
            return
        largest = exact.nan_to_num(0.0, 0.0, 0.0).abs().max()
        usual = distance(plain, exact)
        allowed = torch.finfo(ours.dtype).eps * max(1.0, float(largest))
        allowed += 2 * usual if usual < torch.inf else 0.0
        self.findings.append(Finding(op, backend, what, distance(ours, exact), allowed))

    def _attention(self, a: AttentionArgs, result: tuple[Tensor, Tensor], backend: str) -> None:
        from . import reference

        a = _plain_pages(a)
        batch = a.q.shape[0] if a.cu_seqlens_q is None else a.cu_seqlens_q.numel() - 1
        group = a.q.shape[-2] // a.k.shape[-2]
        for b in self.draw.some(batch, self.draw.sample.sequences):
            start, stop = (0, a.q.shape[1]) if a.cu_seqlens_q is None else a.cu_seqlens_q[b : b + 2].tolist()
            count = min(stop - start, self.draw.sample.rows)
            lo = start + self.draw.random.randint(0, stop - start - count)
            for kv in self.draw.some(a.k.shape[-2], self.draw.sample.kv_heads):
                heads = slice(kv * group, (kv + 1) * group)
                one = _one_head(a, b, start, slice(lo, lo + count), stop, kv, heads)
                rows = slice(lo, lo + count)
                out = (result[0][rows] if a.q.ndim == 3 else result[0][b, rows])[:, heads].cpu()[None]
                exact, lse = reference.attention(one)
                plain, plain_lse = reference.attention(one, dtype=a.q.dtype)
                what = f"sequence {b}, KV head {kv}, queries {lo - start} to {lo - start + count}"
                self._compare("attention", backend, what, out, plain, exact)
                if a.return_lse:
                    ours = (result[1] if a.q.ndim == 3 else result[1][b])[heads, rows].cpu()[None]
                    self._compare("attention", backend, f"lse of {what}", ours, plain_lse, lse)


def distance(ours: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one has -inf or NaN and the other has not."""
    wide = ours.double()
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    difference = (wide - exact).abs().masked_fill(same, 0.0)
    return float(difference.nan_to_num(torch.inf, torch.inf).max())


def _plain_pages(a: AttentionArgs) -> AttentionArgs:
    """The call with pages as (P, page, Hkv, D), should their storage be NZ."""
    return a if a.kv_layout == "nhd" else a._replace(k=plain_pages(a.k), v=plain_pages(a.v), kv_layout="nhd")


def _one_head(
    a: AttentionArgs, b: int, first: int, rows: slice, stop: int, kv: int, heads: slice
) -> AttentionArgs:
    """Some queries of one sequence and one KV head as a dense call on the CPU."""

    def entry(t: Tensor | None, default: int) -> int:
        return default if t is None else int(t[b])

    def keys(cache: Tensor) -> Tensor:
        if a.block_table is not None:
            used = entry(a.seqused_k, 0)
            cache = cache[a.block_table[b, : -(-used // cache.shape[1])].long()].flatten(0, 1)
        elif a.cu_seqlens_k is not None:
            cache = cache[slice(*a.cu_seqlens_k[b : b + 2].tolist())]
        else:
            cache = cache[entry(a.cache_batch_idx, b)]
        return cache[pad : entry(a.seqused_k, cache.shape[0]), kv : kv + 1].cpu()[None]

    def part(t: Tensor | None, where: Any) -> Tensor | None:
        return None if t is None else t[where].cpu()

    pad = entry(a.cache_leftpad, 0)
    k = keys(a.k)
    k_start = entry(a.k_pos0, 0)
    q_start = entry(a.q_pos0, k_start + k.shape[1] - (stop - first))
    slopes = a.alibi_slopes if a.alibi_slopes is None or a.alibi_slopes.ndim == 1 else a.alibi_slopes[b]
    return a._replace(
        q=(a.q[rows] if a.q.ndim == 3 else a.q[b, rows])[:, heads].cpu()[None],
        k=k, v=keys(a.v), alibi_slopes=part(slopes, heads), sinks=part(a.sinks, heads),
        attn_mask=part(a.attn_mask, (slice(b, b + 1), heads, rows, slice(pad, pad + k.shape[1]))),
        cu_seqlens_q=None, cu_seqlens_k=None, block_table=None, seqused_k=None, cache_batch_idx=None,
        cache_leftpad=None, q_pos0=torch.tensor([q_start + rows.start - first]),
        k_pos0=torch.tensor([k_start]), k_scale=part(a.k_scale, slice(kv, kv + 1)),
        v_scale=part(a.v_scale, slice(kv, kv + 1)), return_lse=True,
    )  # fmt: skip
