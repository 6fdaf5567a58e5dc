"""The cases of bench/attention.py: shapes, operands, and what a rival must compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn

from .args import DTYPES
from .env import last_level_cache, on_gpu

Qkv = tuple[Tensor, Tensor, Tensor]  # (B, Sq, H, D), (B, Sk, Hkv, D) twice; keys of a packed batch: B = 1
Rival = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table. Decode is one query a sequence; prefill is causal and has as many as keys."""

    kind: str  # "decode" or "prefill"
    dtype: str
    keys: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page: int = 0  # keys a page; 0: not paged
    packed: bool = False  # sequences of keys / 4 to keys, one after another
    window: int = 0  # keys seen before a query's own; 0: all

    @property
    def name(self) -> str:
        """As it is written in records: what differs from dense causal attention comes after the shape."""
        extra = [
            f"page={self.page}" if self.page else "",
            "varlen" if self.packed else "",
            f"window={self.window}" if self.window else "",
        ]
        shape = f"{self.heads}/{self.kv_heads}x{self.head_dim} batch={self.batch} keys={self.keys}"
        return " ".join([self.kind, self.dtype, shape, *filter(None, extra)])

    @property
    def decode(self) -> bool:
        """Whether memory traffic, not arithmetic, is what a row reports."""
        return self.kind == "decode"

    def lengths(self) -> list[int]:
        """Keys of each sequence."""
        if not self.packed:
            return [self.keys] * self.batch
        return [self.keys * (b + 1) // self.batch for b in range(self.batch)]

    def kv_bytes(self) -> int:
        """Of all keys and values."""
        return 2 * sum(self.lengths()) * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize

    def flop(self) -> int:
        """Two products of 2 * D operations for each query and key that it sees."""
        n, w = self.keys, self.window or self.keys
        seen = sum(self.lengths()) if self.decode else self.batch * (n * (w + 1) - w * (w + 1) // 2)
        return 4 * self.heads * self.head_dim * seen


def suite(name: str) -> list[Case]:
    """The cases of ``quick`` (a minute or two), ``full``, or ``gpu``: those of docs/triton.md."""
    if name == "gpu":
        return gpu_suite()
    decode = [Case("decode", dtype, 32768) for dtype in DTYPES]
    prefill = [Case("prefill", dtype, 2048) for dtype in DTYPES]
    if name == "quick":
        return [*decode, replace(decode[2], page=16), *prefill]
    cases = []
    for case in decode:
        long, batch = replace(case, keys=32768), replace(case, keys=8192, batch=8)
        cases += [long, replace(long, batch=8), replace(case, keys=8192)]
        cases += [replace(batch, page=page) for page in (16, 128)] + [replace(batch, packed=True)]
        cases += [replace(batch, head_dim=dim) for dim in (64, 96, 256)]
        cases += [replace(long, keys=8192, kv_heads=32), replace(long, kv_heads=1)]
    for case in prefill:
        cases += [replace(case, keys=keys, head_dim=dim) for dim in (64, 128) for keys in (512, 2048, 8192)]
        cases.append(replace(case, keys=8192, window=1024))
    return cases


def gpu_suite() -> list[Case]:
    """Prefill of up to 32K queries, decode over up to 128K keys as far as the memory reaches.

    Prefill has as many KV heads as heads: not every kernel of torch takes fewer.
    """
    lengths = (2048, 8192, 32768)
    cases = [Case("prefill", "bf16", n, kv_heads=32, head_dim=dim) for dim in (128, 64) for n in lengths]
    free = torch.cuda.mem_get_info()[0] if on_gpu() else 0
    for keys, batch, page in product((4096, 32768, 131072), (1, 8, 64), (0, 16)):
        case = Case("decode", "bf16", keys, batch=batch, page=page)
        if case.kv_bytes() < free // 3:  # the gathered copy too
            cases.append(case)
    return cases


def operands(case: Case) -> list[Qkv]:
    """Sets of q, k and v: caches of 8 last-level caches together for decode, 2 sets for prefill."""
    sets = -(-8 * last_level_cache() // case.kv_bytes()) if case.decode else 2
    batch, keys = (1, sum(case.lengths())) if case.packed else (case.batch, case.keys)
    dtype = DTYPES[case.dtype]

    def cache() -> Tensor:
        # Drawn in its own type, a piece at a time: a float32 copy of the largest would not fit everywhere.
        tensor = torch.empty(batch, keys, case.kv_heads, case.head_dim, dtype=dtype)
        for row in tensor.view(-1, case.kv_heads, case.head_dim).split(4096):
            row.copy_(torch.randn(row.shape))
        return tensor

    queries = 1 if case.decode else case.keys
    return [
        (torch.randn(case.batch, queries, case.heads, case.head_dim).to(dtype), cache(), cache())
        for _ in range(sets)
    ]


def rivals(case: Case) -> dict[str, Rival]:
    """fastattn and what it is compared with."""
    if case.window:
        return {"fastattn": ours(case), "fastattn, no window": ours(replace(case, window=0))}
    if on_gpu() and not case.packed and not case.page:
        peers = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cuDNN": SDPBackend.CUDNN_ATTENTION}
        kinds = {n: only(kind, enable_gqa(causal=not case.decode)) for n, kind in peers.items()}
        return {"fastattn": ours(case), **kinds}
    if not case.decode:
        return {"fastattn": ours(case), "sdpa enable_gqa": enable_gqa(causal=True)}
    if case.packed:
        return {"fastattn": ours(case), "sdpa each": each(case)}
    if case.page:
        return {"fastattn": ours(case), "sdpa gathered": gathered(case)}
    return {"fastattn": ours(case), "sdpa folded": folded, "sdpa enable_gqa": enable_gqa(causal=False)}


class _Pages(NamedTuple):
    table: Tensor
    lengths: Tensor


def _pages(case: Case) -> _Pages:
    """Pages in random order, as a cache looks after a while."""
    generator = torch.Generator("cpu").manual_seed(0)
    count = -(-case.keys // case.page)
    table = torch.randperm(case.batch * count, generator=generator, dtype=torch.int64, device="cpu")
    return _Pages(
        table.view(case.batch, count).to(torch.get_default_device(), torch.int32),
        torch.full((case.batch,), case.keys, dtype=torch.int32),
    )


def ours(case: Case) -> Rival:
    """fastattn's call for the case."""
    options: dict[str, object] = {"causal": not case.decode}
    if case.window:
        options["window"] = (case.window, 0)
    if case.page:
        pages = _pages(case)
        options |= {"block_table": pages.table, "cache_seqlens": pages.lengths}
    if case.packed:
        options |= {
            "cu_seqlens_q": torch.arange(case.batch + 1, dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, *case.lengths()]).cumsum(0).to(torch.int32),
        }

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.page:
            k, v = (t.view(-1, case.page, *t.shape[2:]) for t in (k, v))
        if case.packed:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        out = fastattn.attention(q, k, v, **options)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out.unflatten(0, (case.batch, 1)) if case.packed else out

    return call


def enable_gqa(causal: bool) -> Rival:
    """torch as models call it; is_causal is top-left aligned, which is the same when Sq = Sk."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa).transpose(1, 2)

    return call


def only(kind: SDPBackend, rival: Rival) -> Rival:
    """The rival by one of torch's kernels alone; raises RuntimeError where torch has it not for the call."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen: AbstractContextManager[None] = sdpa_kernel(kind)
        with chosen:
            return rival(q, k, v)

    return call


def has_kernel(rival: Rival, sample: Qkv) -> bool:
    """Whether torch has the kernel that the rival insists on; true of every rival that insists on none."""
    try:
        rival(*sample)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        return False
    return True


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch for one query a sequence, with the query heads of a KV head as rows."""
    batch, _, heads, dim = q.shape
    rows = q.view(batch, k.shape[2], heads // k.shape[2], dim)
    out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2))
    return out.reshape(batch, 1, heads, v.shape[-1])


def gathered(case: Case) -> Rival:
    """torch has no pages: they are gathered, then ``folded``."""
    table = _pages(case).table.flatten()

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.view(-1, case.page, *t.shape[2:])[table].view_as(t) for t in (k, v))
        return folded(q, k, v)

    return call


def each(case: Case) -> Rival:
    """torch has no packed batches on the CPU: ``folded`` for one sequence after another."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ks, vs = (t.split(case.lengths(), dim=1) for t in (k, v))
        return torch.cat([folded(q[b : b + 1], ks[b], vs[b]) for b in range(case.batch)])

    return call
