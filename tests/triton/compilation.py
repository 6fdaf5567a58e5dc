"""Calls that are compiled for GPUs that are not here, as jobs that a pool of processes can share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.attention import build_args
from fastattn.spec import AttentionArgs


class Job(NamedTuple):
    """One call on one chip of `triton_ops.device.CHIPS`."""

    chip: str
    kind: str  # "prefill", "decode", "paged" decode or "paged prefill"
    head_dim: int = 128
    dtype: str = "float16"
    features: tuple[str, ...] = ()
    specialize: bool = False


class Outcome(NamedTuple):
    """What the compiler says of each launch of a job, and the plan."""

    plan: Any
    reports: tuple[Any, ...]  # `triton_ops.offline.Report`


def run(job: Job) -> Outcome:
    """Compiles every launch of the job."""
    from fastattn.triton_ops.attention import launches
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.offline import compile_for
    from fastattn.triton_ops.plan import can_specialize, plan
    from fastattn.triton_ops.tiles import Tile

    a, chip = call(job), CHIPS[job.chip]
    chosen = plan(a, chip)
    if job.specialize:
        chosen = chosen._replace(tile=Tile(128, 128, 4, 2, True), specialize=True)
        assert can_specialize(a, chosen, chip)
    out = a.q.new_empty((*a.q.shape[:-1], a.v.shape[-1]))
    shape = (*a.q.shape[:-3], a.q.shape[-2], a.q.shape[-3]) if a.return_lse else (0,)
    lse = a.q.new_empty(shape, dtype=torch.float32)
    return Outcome(chosen, tuple(compile_for(launch, chip) for launch in launches(a, chosen, out, lse)))


def call(job: Job) -> AttentionArgs:
    """The call on tensors without memory."""
    dtype = getattr(torch, job.dtype)
    heads, kv_heads, dim = 32, 8, job.head_dim

    def floats(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    options: dict[str, Any] = {
        "window": {"window": (1024, 0)},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": floats(heads, kind=torch.float32)},
        "bool mask": {"attn_mask": torch.empty(4096, 4096, dtype=torch.bool, device="meta")},
        "bias": {"attn_mask": floats(1, heads, 4096, 4096)},
        "float bias": {"attn_mask": floats(4096, 4096, kind=torch.float32)},
        "sinks": {"sinks": floats(heads, kind=torch.float32)},
        "lse": {"return_lse": True},
        "positions": {"q_pos0": ints(4), "k_pos0": ints(4)},  # of packed sequences
        "leftpad": {"cache_leftpad": ints(1), "cache_seqlens": ints(1)},
        "rows": {"cache_batch_idx": ints(1), "cache_seqlens": ints(1)},
    }
    given: dict[str, Any] = {}
    for name in job.features:
        given |= options.get(name, {})
    stored = torch.int8 if "int8" in job.features else dtype
    if "float32 cache" in job.features:
        stored = torch.float32
    if stored != dtype:
        given |= {f"{n}_scale": floats(kv_heads, kind=torch.float32) for n in "kv"}
    q, k = (4096, heads, dim), (4096, kv_heads, dim)
    if job.kind == "paged":
        pages = floats(2048, 16, kv_heads, dim, kind=stored)
        given |= {"block_table": ints(1, 2048), "cache_seqlens": ints(1)}
        return build_args(floats(1, 1, heads, dim), pages, pages, **given)
    if job.kind == "paged prefill":
        pages = floats(2048, 16, kv_heads, dim, kind=stored)
        given |= {"block_table": ints(1, 256), "cache_seqlens": ints(1)}
        return build_args(floats(1, *q), pages, pages, causal=True, **given)
    if job.kind == "decode":
        cache = floats(2, 1 << 22 if "long" in job.features else 32768, kv_heads, dim, kind=stored)[:1]
        return build_args(floats(1, 1, heads, dim), cache, cache, **given)
    if "packed" in job.features:
        given |= {"cu_seqlens_q": ints(5), "cu_seqlens_k": ints(5)}
        return build_args(floats(*q), floats(*k, kind=stored), floats(*k, kind=stored), causal=True, **given)
    full = "full" in job.features
    kv = floats(1, *k, kind=stored)
    return build_args(floats(1, *q), kv, kv, causal=not full, **given)
