"""The PTX of the kernels on a GPU newer than Volta, timed against torch's attention: not a V100's speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from cuda_volta import runtime
from cuda_volta.attention_params import AttentionCall
from cuda_volta.prefill import prefill

SEQLEN, HEADS = 4096, 8
_WARM, _RUNS = 3, 10


class Timed(NamedTuple):
    """Milliseconds, medians."""

    ours: float
    sdpa: float
    error: float  # largest difference of the two results


def name() -> str | None:
    """The GPU, or None where there is none that runs the kernels."""
    if not torch.cuda.is_available():
        return None
    runtime.use_ptx(allowed=True)
    device = torch.device("cuda", torch.cuda.current_device())
    return None if runtime.against(device) else torch.cuda.get_device_name(device)


def compare(head_dim: int, causal: bool) -> Timed:
    """One prefill call of `HEADS` heads and `SEQLEN` tokens, ours and torch's, in turns."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, SEQLEN, HEADS, head_dim)
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").half() for _ in range(3))
    call = AttentionCall(q, k, v, head_dim**-0.5, causal=causal)
    query, key, value = (t.transpose(1, 2) for t in (q, k, v))

    def sdpa() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=causal)

    error = (prefill(call)[0] - sdpa().transpose(1, 2)).abs().max().item()
    times: dict[str, list[float]] = {"ours": [], "sdpa": []}
    for run in range(_WARM + _RUNS):
        for who, function in (("ours", lambda: prefill(call)), ("sdpa", sdpa)):
            if (took := _milliseconds(function)) and run >= _WARM:
                times[who].append(took)
    ours, theirs = (sorted(times[who])[_RUNS // 2] for who in ("ours", "sdpa"))
    return Timed(ours, theirs, error)


def _milliseconds(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
