"""Calls of the small ops: what the vendor's compiler is asked to plan, and small ones of them to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ascend_ops import ops
from ascend_ops.ops import Weight
from fastattn import reference_ops
from fastattn.backends import torch_ops
from fastattn.backends.ascend_small import kernel_weight
from fastattn.spec import AppendKvArgs, EmbeddingArgs, LinearArgs, RmsNormArgs, RotaryArgs, SwigluArgs
from tests.ops.weights import make

WEIGHTS: dict[str, dict[str, Any]] = {
    "int4 of 128": {"group": 128},
    "int4 of 32": {"group": 32},
    "int4 with act-order": {"group": 128, "g_idx": True},
    "int8 of 128": {"group": 128},
    "int8 without offset": {"group": 128, "mins": False},
    "float16": {},
}


def calls(*, small: bool = False) -> dict[str, tuple[str, Any]]:
    """(op, record) by name; ``small`` ones take seconds where kernels run on this CPU."""
    g = torch.Generator().manual_seed(0)
    hidden, rows, width = (96, 5, 160) if small else (4096, 8, 11008)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).half()

    phase = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(32) / 32)
    cos, sin = phase.cos(), phase.sin()
    heads, cache = values(6, 4, 64), values(2, 16, 4, 64)
    positions = torch.tensor([3, 0, 49, 7, 7, 1])
    slots = torch.tensor([3, -1, 19, 0, 8, 31])
    append = AppendKvArgs(cache, cache.clone(), heads, values(6, 4, 64), slots)
    x = values(rows, hidden)
    found: dict[str, tuple[str, Any]] = {
        "norm": ("rms_norm", RmsNormArgs(x, values(hidden), 1e-5)),
        "norm with residual": ("rms_norm", RmsNormArgs(x, values(hidden), 1e-5, values(rows, hidden))),
        "gate": ("swiglu", SwigluArgs(values(rows, 2 * width))),
        "rotary": ("rotary", RotaryArgs(heads, cos, sin, positions)),
        "rotary of pairs": ("rotary", RotaryArgs(heads, cos, sin, positions, True)),
        "partial rotary": ("rotary", RotaryArgs(values(6, 4, 80), cos, sin, positions)),
        "append": ("append_kv", append),
        "append with rotary": ("append_kv", append._replace(cos=cos, sin=sin, positions=positions)),
    }
    for name, options in WEIGHTS.items():
        w = make(name.split()[0], 72, 256, **options)
        for n in (1, 70):
            found[f"linear {name}, {n} rows"] = ("linear", LinearArgs(values(n, 256), w))
        found[f"embedding {name}"] = ("embedding", EmbeddingArgs(torch.tensor([5, 0, 71]), w, torch.float16))
    return found


def launch(op: str, a: Any) -> Any:
    """The op by our kernels, wherever those run."""
    if op == "rms_norm":
        return ops.rms_norm(a.x, a.weight, a.eps, a.residual)
    if op == "swiglu":
        return ops.swiglu(a.x)
    if op == "rotary":
        return ops.rotary(a.x, a.cos, a.sin, a.positions, interleaved=a.interleaved)
    if op == "append_kv":
        return ops.append_kv(
            a.k_cache, a.v_cache, a.k, a.v, a.slots, cos=a.cos, sin=a.sin, positions=a.positions
        )
    weight: Weight = kernel_weight(a.weight)
    return ops.linear(a.x, weight) if op == "linear" else ops.embedding(a.ids, weight, a.dtype)


def check_lowered(name: str) -> dict[str, float]:
    """Runs in the vendor's environment: the op from its vendor-lowered IR; the errors, ours and torch's."""
    from ascend_ops.launch import cpu_executor
    from ascend_ops.toolchain.execute import Lowered

    op, a = calls(small=True)[name]
    oracle: Callable[[Any], Any] = getattr(reference_ops, op)
    exact = oracle(a)
    plain_args = a
    if op == "append_kv":
        plain_args = a._replace(k_cache=a.k_cache.clone(), v_cache=a.v_cache.clone())
    plain = getattr(torch_ops, op)(plain_args)
    with cpu_executor(Lowered):
        ours = launch(op, a)
    if op == "append_kv":
        ours, plain = (a.k_cache, a.v_cache), (plain_args.k_cache, plain_args.v_cache)
    triples = zip(*((t if isinstance(t, tuple) else (t,)) for t in (ours, plain, exact)), strict=True)
    errors = [(_error(o, e), _error(p, e), float(e.abs().max())) for o, p, e in triples if e.numel()]
    return {"ours": max(e[0] for e in errors), "torch": max(e[1] for e in errors), "largest": errors[0][2]}


def _error(t: torch.Tensor, exact: torch.Tensor) -> float:
    return float((t.double() - exact.double()).abs().max())
