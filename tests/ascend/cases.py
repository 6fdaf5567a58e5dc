"""Random attention calls of the kinds that torch_npu's operators take, or just do not."""

from __future__ import annotations

import random

import torch

from ascend_ops.router import Chip, chip_of
from fastattn.attention import build_args
from fastattn.backends.ascend import router_call
from fastattn.spec import AttentionArgs
from tests.api.cases import cumulative, int32

HEADS = ((1, 1), (2, 2), (4, 2), (6, 3), (8, 1))
HEAD_DIMS = (128, 128, 64, 16, 192, 40, 256)
LAYOUTS = ("dense", "dense", "cache", "packed", "paged", "packed_paged")
CHIPS = {family: chip_of(family) for family in ("910b", "910_93", "950", "310p", "910a")}
#: 310P under a torch_npu whose ATB operators have no compressed masks.
CHIPS["310p before"] = Chip(
    "310p", frozenset(n for n in CHIPS["310p"].operators if not n.endswith(("_v2", "_v3")))
)


def random_args(seed: int, family: str) -> AttentionArgs:
    """One validated call; most can run on the chip ``family`` of `CHIPS`."""
    rng = random.Random(f"{seed} {family}")  # noqa: S311
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    old = CHIPS[family].kv_layout == "npu_nz"
    dtype = torch.float16 if old else rng.choice((torch.float16, torch.bfloat16, torch.float32))
    d = rng.choice((64, 128) if old else HEAD_DIMS)
    dv = rng.choice((d, d, d, 128, 64)) if not old else d
    heads, kv_heads = rng.choice(HEADS)
    layout = rng.choice(LAYOUTS)
    batch = rng.choice((1, 2, 3))
    longest = rng.choice((1, 5, 17, 50))
    k_lens = [rng.randint(0 if rng.random() < 0.2 else 1, longest) for _ in range(batch)]
    if rng.random() < 0.3:
        q_lens = [1] * batch
    elif old and "paged" not in layout:
        k_lens = [longest] * batch if layout == "dense" else [max(n, 1) for n in k_lens]
        q_lens = list(k_lens)
    else:
        q_lens = [rng.randint(0, n + (0 if old else 2)) for n in k_lens]

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    o = {}
    q_shape: tuple[int, ...] = (batch, max(1, *q_lens) if batch > 1 else max(1, q_lens[0]))
    kv_shape: tuple[int, ...] = (batch, max(1, *k_lens) if batch > 1 else max(1, k_lens[0]))
    if layout in ("packed", "packed_paged"):
        o["cu_seqlens_q"] = cumulative(q_lens)
        q_shape = (sum(q_lens) + rng.choice((0, 0, 2)),)
    if layout == "packed":
        o["cu_seqlens_k"] = cumulative(k_lens)
        kv_shape = (sum(k_lens) + rng.choice((0, 3)),)
    if layout in ("paged", "packed_paged"):
        page = rng.choice((16, 64) if old else (128, 256, 16, 24))
        each = max(1, -(-max(k_lens) // page))
        kv_shape = (batch * each + 1, page)
        o["block_table"] = int32(rng.sample(range(batch * each + 1), batch * each)).view(batch, each)
    if layout in ("paged", "packed_paged", "cache"):
        o["cache_seqlens"] = int32(k_lens)
    q, k, v = values(*q_shape, heads, d), values(*kv_shape, kv_heads, d), values(*kv_shape, kv_heads, dv)
    if old and "paged" in layout:
        o["kv_layout"] = "npu_nz"
    o["causal"] = old or rng.random() < 0.5
    if rng.random() < 0.35:
        o["window"] = (rng.choice((None, 0, 3, 20)), rng.choice((None, 0, 2)))
    if rng.random() < 0.2:
        o["sinks"] = torch.randn(heads, generator=g).bfloat16().float()
    if layout == "dense" and not old and rng.random() < 0.4:
        shape = (rng.choice((1, batch)), rng.choice((1, 1, heads)), q_shape[1], kv_shape[1])
        keep = torch.rand(shape, generator=g) > 0.3
        bias = torch.randn(shape, generator=g).to(dtype).masked_fill(~keep, -torch.inf)
        o["attn_mask"] = keep if rng.random() < 0.6 else bias
    o["return_lse"] = not old and rng.random() < 0.5
    return build_args(q, k, v, **o)


def nz_stored(a: AttentionArgs) -> AttentionArgs:
    """The call with the bytes of its pages rearranged as NZ, declared as before."""

    def arrange(pages: torch.Tensor) -> torch.Tensor:
        p, page, heads, dim = pages.shape
        return pages.reshape(p, page, heads * dim // 16, 16).transpose(1, 2).reshape(pages.shape)

    return a._replace(k=arrange(a.k), v=arrange(a.v))


__all__ = ["CHIPS", "nz_stored", "random_args", "router_call"]
