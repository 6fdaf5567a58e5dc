"""Any call, however large: what the router sends to an operator is within that operator's documented limits.

The limits are written down here once more, over the arguments of the operators and not over the call, so
that a call which the router misjudges is found. Tensors are on the meta device: a million keys cost nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_ops.router import AttentionCall, Invocation, chip_of, route
from ascend_ops.router.validate import faults

from .cases import CHIPS

HALVES = (torch.float16, torch.bfloat16)


def fused_infer(i: Invocation) -> dict[str, bool]:
    """aclnnFusedInferAttentionScoreV4."""
    (q, k, v), kw = i.args, i.kwargs
    tnd, heads, kv_heads = kw["input_layout"] == "TND", kw["num_query_heads"], kw["num_key_value_heads"]
    keys = kw.get("actual_seq_kvlen") or [k.shape[1]]
    ends = [0, *kw["actual_seq_qlen"]] if tnd else [0, q.shape[1]]
    queries = max(b - a for a, b in pairwise(ends))
    paged = "block_table" in kw
    longest = max(keys) if paged or not tnd else max(b - a for a, b in pairwise([0, *keys]))
    return {
        "dtype": q.dtype in HALVES and {k.dtype, v.dtype} == {q.dtype},
        "head_dim": q.shape[-1] <= 512 and q.shape[-1] % 16 == 0,
        "TND": not tnd or q.shape[-1] in (128, 192),
        "heads": heads <= 256 and heads % kv_heads == 0 and heads // kv_heads <= 64,
        "batch": (len(keys) if tnd or paged else q.shape[0]) <= (4096 if tnd else 65536),
        "keys": longest <= (262144 if queries == 1 and not tnd else 20971520),
        "tokens": not tnd or q.shape[0] <= 1 << 20,
        "rows": tnd or queries == 1 or heads * q.shape[-1] < 65535,
        "page": not paged
        or kw["block_size"] in ((128, 256, 384, 512) if queries > 1 or tnd else range(16, 513, 16)),
        "page row": not paged or kv_heads * q.shape[-1] <= 65535,
        "pages": not paged or max(k.numel(), v.numel()) < 1 << 31,
        "own pages": not paged or sum(-(-n // kw["block_size"]) for n in keys) <= k.shape[0],
        "mask of one row": tnd or queries > 1 or "atten_mask" not in kw or longest <= 512,
        "one row": tnd or queries > 1 or kw.get("sparse_mode", 0) in (0, 1),
        "sinks": "learnable_sink" not in kw or (tnd and kw["learnable_sink"].dtype == torch.bfloat16),
    }  # fmt: skip


def fusion(i: Invocation) -> dict[str, bool]:
    """aclnnFlashAttentionScoreV2."""
    (q, k, v, heads, layout), kw = i.args, i.kwargs
    tnd = layout == "TND"
    sizes = (q.shape[0], k.shape[0]) if tnd else (q.shape[1], k.shape[1])
    return {
        "dtype": q.dtype in (*HALVES, torch.float32),
        "head_dim": v.shape[-1] <= q.shape[-1] <= 768,
        "heads": heads <= 256,
        "batch": (len(kw["actual_seq_qlen"]) if tnd else q.shape[0]) <= (1024 if tnd else 2 << 20),
        "length": max(sizes) <= 1 << 20,
        "bias": "pse" not in kw or kw["pse_type"] == 0,
    }


def atb(i: Invocation) -> dict[str, bool]:
    """SelfAttentionOperation and PagedAttentionOperation on 310P and 910A."""
    kw = i.kwargs
    q, mask = kw["query"], kw.get("mask")
    batch = kw["seq_len"].numel() if "seq_len" in kw else q.shape[0]
    page = kw["key_cache"].shape[2] if "key_cache" in kw else 16
    return {
        "dtype": q.dtype == torch.float16,
        "head_dim": q.shape[-1] <= 256 and q.shape[-1] % 16 == 0,
        "batch": batch <= 2000,
        "page": page % 16 == 0 and page * q.shape[-1] <= 128 * 128,
        "mask": mask is None or mask.numel() <= 16400 * 16400,
    }


LAYOUTS = ("dense", "masked", "packed", "pages", "packed pages")
#: Layouts that each chip has an operator for.
SERVED = {
    "910b": LAYOUTS,
    "910_93": LAYOUTS,
    "950": ("dense", "masked", "packed"),
    "310p": ("dense", "packed", "pages", "packed pages"),
    "310p before": ("dense", "packed", "pages", "packed pages"),
    "910a": ("pages", "packed pages"),
}
PAGES = {"npu_fused": fused_infer, "npu_fusion": fusion, "_npu": atb}


@st.composite
def calls(draw: st.DrawFn, layout: str, pages: str) -> AttentionCall:
    """Usual calls, with a few sizes at and around the limits, and pages mostly in the layout ``pages``.

    The first of every choice make the plainest call, which hypothesis tries first.
    """
    edges = draw(
        st.sets(st.sampled_from(("dtype", "d", "heads", "batch", "queries", "keys", "page")), max_size=2)
    )

    def one(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def size(name: str, usual: tuple[Any, ...], edge: tuple[Any, ...]) -> Any:
        return one(*(edge if name in edges else usual))

    def meta(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    dtype = size("dtype", (torch.float16,), (torch.bfloat16, torch.float32))
    d = size("d", (128, 128, 64), (16, 192, 40, 256, 512, 528, 768, 776))
    dv = one(d, d, d, 64, 128) if "d" in edges else d
    heads, kv_heads = size(
        "heads", ((2, 2), (8, 2)), ((64, 1), (65, 1), (256, 256), (257, 257), (512, 512), (256, 2))
    )
    batch = size("batch", (1, 2, 3), (1024, 1025, 2000, 2001, 4096, 4097, 65536, 65537))
    sq = size("queries", (1, 1, 2, 17), (4096, 16400, 1 << 20, (1 << 20) + 1))
    sk = size(
        "keys",
        (sq, 17, 512),
        (1, 513, 16400, 262144, 262145, 1 << 20, (1 << 20) + 1, 20971520, 20971521),
    )
    o: dict[str, Any] = {"right": one(0, 0, 0, None, 2), "left": one(None, None, None, 3, 600)}
    o["return_lse"] = one(False, False, False, True)
    if one(*[False] * 5, True):
        o["sinks"] = torch.full((heads,), one(1.0, 0.1))
    q = meta(batch, sq, heads, d)
    k, v = (meta(batch, sk, kv_heads, n) for n in (d, dv))
    if layout == "masked":
        shape = (one(1, batch), one(1, 1, heads), sq, sk)
        o["attn_mask"] = torch.empty(shape, dtype=one(torch.bool, dtype), device="meta")
        o["attn_mask"] = o["attn_mask"].expand(batch, heads, sq, sk)
    if layout in ("packed", "packed pages"):
        q = q.flatten(0, 1)
        o["cu_seqlens_q"] = torch.arange(batch + 1) * sq
    if layout == "packed":
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        o["cu_seqlens_k"] = torch.arange(batch + 1) * sk
    if "pages" in layout:
        page = size("page", (128,), (16, 64, 384, 512, 24, 640))
        each = -(-sk // page)
        o["kv_layout"] = one(pages, pages, pages, "nhd", "npu_nz")
        o["seqused_k"] = torch.full((batch,), sk, dtype=torch.int32)
        o["block_table"] = torch.empty(batch, each, dtype=torch.int32, device="meta")
        count = max(1, batch * each - one(0, 0, 1))
        k, v = (meta(count, page, kv_heads, n) for n in (d, dv))
    return AttentionCall(q, k, v, d**-0.5, **o)


def one_of_each_chip() -> list[Any]:
    """Chips with layouts: all slow but the last that a chip has an operator for."""
    return [
        pytest.param(chip, layout, marks=[] if layout == SERVED[chip][-1] else pytest.mark.slow)
        for chip in CHIPS
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("chip", "layout"), one_of_each_chip())
def test_within_the_limits_or_refused(chip: str, layout: str) -> None:
    reached = set()

    @given(call=calls(layout, CHIPS[chip].kv_layout))
    @settings(max_examples=30)
    def check(call: AttentionCall) -> None:
        found = route(call, CHIPS[chip])
        if found.unsupported():
            with pytest.raises(ValueError, match=CHIPS[chip].family) as error:
                found.invocation()
            assert all(why and all(why) for why in found.against.values())
            assert all(line in str(error.value) for line in found.unsupported())
            return
        i = found.invocation()
        assert i is not None
        (rules,) = {p for name, p in PAGES.items() if i.name.startswith(name)}
        assert [n for n, kept in rules(i).items() if not kept] == [], i
        assert faults(i) == []
        reached.add(i.name)

    check()
    assert bool(reached) == (layout in SERVED[chip]), "nothing was let through, or what has no operator"


def test_rules_find_what_they_are_there_for() -> None:
    """The check above can fail: a call that was changed after the router judged it."""
    q = torch.empty(1, 4, 2, 128, dtype=torch.float16, device="meta")
    good = route(AttentionCall(q, q, q, 0.1, right=0), chip_of("910b")).invocation()
    assert good is not None
    assert all(fused_infer(good).values())
    wide = good._replace(args=tuple(torch.empty(1, 4, 2, 528, dtype=torch.float16) for _ in range(3)))
    assert not fused_infer(wide)["head_dim"]
    assert not fused_infer(good._replace(kwargs=good.kwargs | {"num_query_heads": 258}))["heads"]
