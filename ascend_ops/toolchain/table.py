"""The tile table: every kind of call, the tiles it gets, and the vendor's plan of its kernels.

``python -m ascend_ops.toolchain.table --python .venv-ascend/bin/python`` prints it as docs/ascend.md has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import ops
from ..attention import attention
from ..chips import CHIPS, Chip
from .client import call_all
from .instances import Instance, recording
from .plan import is_950

#: One of each generation: all 910B plan alike, and so do all A3.
TARGETS = ("Ascend910B3", "Ascend910_9391")
#: The 950 has a compiler, tiles and a shorter table of its own: each head_dim, and each kind of edge block.
TARGET_950 = "Ascend950PR_9579"
CALLS_950 = (
    *(f"{kind}, D={head_dim}" for head_dim in (64, 128, 256) for kind in ("causal", "decode")),
    "causal, softcap", "causal, packed", "causal, pages of 128", "causal, ALiBi, D=128",
    "causal, bool mask, D=128",
)  # fmt: skip
#: Constants of kernels that are sizes of tiles.
_SIZES = ("BLOCK", "BLOCK_Q", "BLOCK_R", "BLOCK_M", "BLOCK_N", "BLOCK_K", "EDGE_K", "HEADS")
HEADER = (
    "| call | kernel | tiles | UB | L1 | L0C | workspace | syncs a block |",
    "|---|---|---|---:|---:|---:|---:|---|",
)


class Call(NamedTuple):
    """A kind of call; sizes that no kernel is compiled for are as small as can be."""

    name: str
    head_dim: int = 128
    v_head_dim: int = 128
    queries: int = 64
    group: int = 4
    dtype: torch.dtype = torch.float16
    page: int = 0
    packed: bool = False
    options: Mapping[str, Any] = {}

    def instances(self, chip: Chip) -> list[Instance]:
        """The kernels that the call launches, with their constants: the tiles are the chip's."""
        heads = 2 * self.group
        q = torch.empty(2, self.queries, heads, self.head_dim, dtype=self.dtype)
        rows = (4, self.page) if self.page else (2, 64)
        k, v = (torch.empty(*rows, 2, d, dtype=self.dtype) for d in (self.head_dim, self.v_head_dim))
        options = dict(self.options)
        if self.page:
            options["block_table"] = torch.zeros(2, 2, dtype=torch.int32)
            options["seqused_k"] = torch.zeros(2, dtype=torch.int32)
        if self.packed:
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            ends = torch.zeros(3, dtype=torch.int32)
            options.update(cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=self.queries, max_seqlen_k=64)
        with recording() as seen:
            attention(q, k, v, scale=1.0, chip=chip, **options)
        return seen


class SmallCall(NamedTuple):
    """A call of `ops`."""

    name: str
    launch: Callable[[], object]

    def instances(self, chip: Chip) -> list[Instance]:
        """The kernels that it launches, the same on every chip."""
        with recording() as seen:
            self.launch()
        return seen


def calls() -> Iterator[Call]:
    """Every kind of attention call: each head_dim, then each field that changes the code of a kernel."""
    causal: dict[str, Any] = {"causal": True, "return_lse": True}
    for head_dim, v_head_dim in ((16, 16), (32, 32), (64, 64), (128, 128), (192, 128), (256, 256)):
        dims = f"D={head_dim}" if head_dim == v_head_dim else f"D={head_dim}/{v_head_dim}"
        yield Call(f"causal, {dims}", head_dim, v_head_dim, options=causal)
        yield Call(f"decode, {dims}", head_dim, v_head_dim, 1)
    yield Call("full", options={"return_lse": True})
    yield Call("causal, D=80 (padded to 128)", 80, 80, options=causal)
    yield Call("causal, bfloat16", dtype=torch.bfloat16, options=causal)
    yield Call("causal, softcap", options={**causal, "softcap": 30.0})
    for head_dim in (64, 256):
        yield Call(f"causal, softcap, D={head_dim}", head_dim, head_dim, options={**causal, "softcap": 30.0})
    yield Call("causal, sinks, k and v scales", options={**causal, "sinks": torch.zeros(8), **_scales()})
    yield Call("causal, every index", options={**causal, **_indices()})
    yield Call("causal, packed", packed=True, options=causal)
    for page in (16, 128):
        yield Call(f"causal, pages of {page}", page=page, options=causal)
        yield Call(f"decode, pages of {page}", queries=1, page=page)
    for head_dim in (64, 128, 256):
        for name, biases in _biases().items():
            yield Call(f"causal, {name}, D={head_dim}", head_dim, head_dim, options={**causal, **biases})
    slopes_and_sinks = {"alibi_slopes": torch.zeros(8), "sinks": torch.zeros(8)}
    yield Call("decode, ALiBi, sinks, scales", queries=1, options={**slopes_and_sinks, **_scales()})
    yield Call(
        "decode, bool mask", queries=1, options={"attn_mask": torch.zeros(2, 8, 1, 64, dtype=torch.bool)}
    )
    yield Call("decode, 4 queries, causal", queries=4, options=causal)
    yield Call("decode, 8 queries of 8 heads, causal", queries=8, group=8, options=causal)


def small_calls() -> Iterator[SmallCall]:
    """The other kernels, at the sizes of Llama-7B."""
    x, weight = torch.empty(8, 4096, dtype=torch.float16), torch.empty(4096, dtype=torch.float16)
    heads, table = torch.empty(8, 32, 128, dtype=torch.float16), torch.empty(16, 64)
    cache, slots = torch.empty(4, 128, 32, 128, dtype=torch.float16), torch.zeros(8, dtype=torch.int64)
    rotation: dict[str, Any] = {"cos": table, "sin": table, "positions": slots}
    yield SmallCall("RMSNorm", lambda: ops.rms_norm(x, weight, 1e-5))
    yield SmallCall("residual + RMSNorm", lambda: ops.rms_norm(x, weight, 1e-5, x))
    yield SmallCall("SwiGLU", lambda: ops.swiglu(x))
    yield SmallCall("rotary", lambda: ops.rotary(heads, table, table, slots))
    yield SmallCall("rotary of pairs", lambda: ops.rotary(heads, table, table, slots, interleaved=True))
    yield SmallCall("KV append", lambda: ops.append_kv(cache, cache, heads, heads, slots))
    for name, pairs in (("rotary", False), ("rotary of pairs", True)):
        append = partial(ops.append_kv, cache, cache, heads, heads, slots, interleaved=pairs, **rotation)
        yield SmallCall(f"KV append with {name}", append)
    for rows in (1, 64):
        for name, w in _weights().items():
            yield SmallCall(f"{name} linear, {rows} rows", partial(ops.linear, x[:1].expand(rows, -1), w))
    for name, w in _weights().items():
        yield SmallCall(f"{name} embedding", partial(ops.embedding, slots, w, torch.float16))


def _weights() -> dict[str, ops.Weight]:
    shape, scales = (64, 4096), torch.empty(64, 32, dtype=torch.float16)
    nibbles = torch.empty(64, 2048, dtype=torch.uint8)
    grouped = ops.Weight(4, shape, nibbles, scales, scales, 128)
    return {
        "float16": ops.Weight(16, shape, torch.empty(shape, dtype=torch.float16)),
        "W4A16": grouped,
        "W4A16 act-order": grouped._replace(g_idx=torch.zeros(4096, dtype=torch.int32)),
        "W8A16": ops.Weight(8, shape, torch.empty(shape, dtype=torch.int8), scales, scales, 128),
    }


def _scales() -> dict[str, torch.Tensor]:
    return {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}


def _indices() -> dict[str, torch.Tensor]:
    names = ("seqused_k", "cache_leftpad", "cache_batch_idx", "q_pos0", "k_pos0")
    return {name: torch.zeros(2, dtype=torch.int32) for name in names}


def _biases() -> dict[str, dict[str, torch.Tensor]]:
    shape = (2, 8, 64, 64)
    return {
        "ALiBi": {"alibi_slopes": torch.zeros(8)},
        "bool mask": {"attn_mask": torch.zeros(shape, dtype=torch.bool)},
        "float16 mask": {"attn_mask": torch.zeros(shape, dtype=torch.float16)},
        "float32 mask": {"attn_mask": torch.zeros(shape)},
    }


def plans(
    python: Path, root: Path, *targets: str, only: Container[str] | None = None
) -> list[tuple[str, Instance, dict[str, Any]]]:
    """(name of the call, kernel, target -> fields of its `plan.Plan`) of the table, or of ``only`` its calls.

    The tiles are those of the first target.
    """
    kinds: list[Call | SmallCall] = [*calls(), *small_calls()]
    asked = [kind for kind in kinds if only is None or kind.name in only]
    found = [(kind.name, kernel) for kind in asked for kernel in kind.instances(CHIPS[targets[0]])]
    distinct = list(dict.fromkeys(kernel for _, kernel in found))
    requests = [kernel.planning(*targets) for kernel in distinct]
    answers = call_all(python, [root], "ascend_ops.toolchain.worker:plan_kernel", requests)
    planned = dict(zip(distinct, answers, strict=True))
    return [(name, kernel, planned[kernel]) for name, kernel in found]


def row(call: str, kernel: Instance, plan: Mapping[str, Any]) -> str:
    """A line of the table: what one kernel of a call occupies of each memory."""
    constants = dict(kernel.constants)
    sizes = [str(constants[n]) for n in _SIZES if n in constants]
    used = [f"{plan['occupancy'].get(memory, 0) / 1024:.1f} K" for memory in ("UB", "L1", "L0C")]
    name = kernel.kernel.split(":")[1].removesuffix("_kernel")
    if not plan["accepted"]:
        needs = (f"{m} {n / 1024:.1f} K of {has / 1024:.1f} K" for m, (n, has) in plan["overflow"].items())
        why = plan["error"].partition("\n")[0] or ", ".join(needs)
        return f"| {call} | {name} | {' x '.join(sizes)} | refused: {why} | | | | |"
    syncs = ", ".join(map(str, plan["syncs"].get("aic", ()))) or "0"
    cells = (call, name, " x ".join(sizes), *used, f"{plan['workspace'] / 1024:.0f} K", syncs)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table of a chip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="of the environment with triton-ascend")
    parser.add_argument("--chip", choices=sorted(CHIPS), default=TARGETS[0])
    options = parser.parse_args()
    only = CALLS_950 if is_950(options.chip) else None
    print(*HEADER, sep="\n")
    for call, kernel, planned in plans(options.python, Path(__file__).parents[2], options.chip, only=only):
        plan = planned[options.chip]
        print(row(call, kernel, plan) + ("  retried" if plan["retried"] else ""), flush=True)


if __name__ == "__main__":
    main()
