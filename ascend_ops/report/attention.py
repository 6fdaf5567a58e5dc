"""Attention on an NPU: each kind of call on torch_npu's operator and on our kernel, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import router
from ..attention import attention
from ..router import AttentionCall, Chip
from ..router import lengths as lengths_of
from ..router.atb import plain_pages
from .measure import Row, Setting, row


class Case(NamedTuple):
    """A causal call, if ``right`` is 0."""

    name: str
    lengths: tuple[tuple[int, int], ...]  # (queries, keys) of each sequence
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    dtype: torch.dtype = torch.float16
    left: int | None = None
    right: int | None = 0
    page: int = 0  # 0: dense if lengths are equal, packed otherwise


def cases(*, full: bool, quick: bool) -> Iterator[Case]:
    """The matrix; ``quick``: the same kinds of calls at sizes that an interpreter can do."""
    n = 96 if quick else 1024
    shape: dict[str, Any] = {"heads": (4, 2), "head_dim": 64} if quick else {}
    for dtype in (torch.float16, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        yield Case(f"causal, {kind}", ((n, n),) * 2, dtype=dtype, **shape)
        yield Case(f"full, {kind}", ((n, n),), dtype=dtype, right=None, **shape)
        yield Case(f"window of 64, {kind}", ((n, n),), dtype=dtype, left=64, **shape)
        yield Case(f"packed, {kind}", ((n, n), (n // 3, n // 3), (1, 7)), dtype=dtype, **shape)
        yield Case(f"paged prefill, {kind}", ((n // 2, n), (5, 77)), dtype=dtype, page=128, **shape)
        yield Case(f"paged decode, {kind}", ((1, n), (1, 77), (1, 1)), dtype=dtype, page=128, **shape)
        yield Case(f"decode with a window, {kind}", ((1, n),) * 2, dtype=dtype, page=128, left=50, **shape)
    for head_dim in (40, 64, 80, 256):
        yield Case(f"causal, head_dim {head_dim}", ((n // 2, n // 2),), head_dim=head_dim, heads=(4, 2))
    yield Case("more queries than keys", ((n, n // 2),), **shape)
    for length in (4096, 8192, 16384, 32768) if full else ():
        yield Case(f"causal, {length}", ((length, length),), heads=(8, 8))


def build(case: Case, chip: Chip, device: torch.device, seed: int = 0) -> AttentionCall:
    """The case's call with random values."""
    g = torch.Generator().manual_seed(seed)
    heads, kv_heads = case.heads

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(case.dtype).to(device)

    def ends(counts: list[int]) -> Tensor:
        return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)

    q_lens, k_lens = ([pair[i] for pair in case.lengths] for i in (0, 1))
    options: dict[str, Any] = {"left": case.left, "right": case.right, "scale": case.head_dim**-0.5}
    dense = len(set(case.lengths)) == 1
    if dense:
        q = values(len(q_lens), q_lens[0], heads, case.head_dim)
    else:
        q = values(sum(q_lens), heads, case.head_dim)
        options["cu_seqlens_q"] = ends(q_lens)
    if case.page:
        each = -(-max(k_lens) // case.page)
        shape: tuple[int, ...] = (len(k_lens) * each, case.page)
        order = torch.randperm(shape[0], generator=g).to(torch.int32)
        options |= {"block_table": order.view(-1, each).to(device)}
        options["seqused_k"] = torch.tensor(k_lens, dtype=torch.int32, device=device)
        options["kv_layout"] = chip.kv_layout
    elif dense:
        shape = (len(k_lens), k_lens[0])
    else:
        shape = (sum(k_lens),)
        options["cu_seqlens_k"] = ends(k_lens)
    k, v = (values(*shape, kv_heads, case.head_dim) for _ in range(2))
    return AttentionCall(q, k, v, **options)


def exact(call: AttentionCall) -> Tensor:
    """torch's attention in float64 on the CPU, sequence by sequence: (T, H, D)."""
    lens = lengths_of(call)
    group = call.heads // call.kv_heads
    queries = call.q.flatten(0, -3).cpu().double().split(lens.q)
    out = []
    for b, q in enumerate(queries):
        if call.block_table is not None:
            pages = [t[call.block_table[b].long()] for t in (call.k, call.v)]
            if call.kv_layout == "npu_nz":
                pages = [plain_pages(t) for t in pages]
            k, v = (t.flatten(0, 1)[: lens.k[b]] for t in pages)
        else:
            k, v = (t.flatten(0, -3).split(lens.k)[b] for t in (call.k, call.v))
        k, v = (t.cpu().double().repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
        offset = torch.arange(k.shape[1]) - torch.arange(len(q))[:, None] - (k.shape[1] - len(q))
        seen = torch.ones_like(offset, dtype=torch.bool)
        if call.left is not None:
            seen &= offset >= -call.left
        if call.right is not None:
            seen &= offset <= call.right
        found = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen, scale=call.scale)
        out.append(found.transpose(0, 1).masked_fill(~seen.any(-1)[:, None, None], 0.0))
    return torch.cat(out)


def by_kernels(call: AttentionCall) -> Tensor:
    """The call on our Triton kernels."""
    own: dict[str, Any] = {
        n: getattr(call, n) for n in ("scale", "cu_seqlens_q", "cu_seqlens_k", "block_table", "seqused_k")
    }
    lens = lengths_of(call)
    own |= {"max_seqlen_q": max(lens.q), "max_seqlen_k": max(lens.k)}
    return attention(call.q, call.k, call.v, window=(call.left, call.right), **own)[0]


def rows(setting: Setting) -> Iterator[Row]:
    """The matrix."""
    for case in cases(full=setting.full, quick=setting.quick):
        call = build(case, setting.chip, setting.device)

        def vendor(call: AttentionCall = call) -> router.Invocation | str:
            found = router.route(call, setting.chip)
            return "; ".join(found.unsupported()) or found.invocation() or "no scores"

        yield row(setting, case.name, exact(call), vendor, itemgetter(0), partial(by_kernels, call))
