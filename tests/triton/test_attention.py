"""Attention through Triton against the float64 oracle: every layout, feature, data type and plan."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import UnsupportedError, dispatch
from fastattn.attention import build_args

from ..api.cases import DTYPES, HEAD_DIMS, LAYOUTS, Case, int32, random_case
from .calls import DEVICE, assert_matches, check, device_args, on_device

pytestmark = [pytest.mark.emulate("triton"), pytest.mark.toolchain, pytest.mark.gpu]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(layout: str, dtype: torch.dtype) -> None:
    dims = random.Random(f"{layout} {dtype} triton")  # noqa: S311
    before = dispatch.calls["triton", "attention"]
    for seed in range(2):
        check(random_case(seed, layout, dtype, dims.choice(HEAD_DIMS)))
    assert dispatch.calls["triton", "attention"] == before + 2


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    head_dim=st.integers(1, 256),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=20)
def test_any_call(layout: str, dtype: torch.dtype, head_dim: int, seed: int) -> None:
    check(random_case(seed, layout, dtype, head_dim))


# --------------------------------------------------------------------------------------- every way of running
def variants(case: Case) -> dict[str, Any]:
    """Plans that the case can run by, with tiles small enough that few keys have every phase."""
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.plan import Plan, can_specialize, takes_descriptors
    from fastattn.triton_ops.tiles import Tile

    a = device_args(case)
    group = a.q.shape[-2] // a.k.shape[-2]
    found = {
        "plain": Plan(Tile(16, 16, 4, 2)),
        "wide": Plan(Tile(64, 16, 4, 1)),
        "long": Plan(Tile(16, 64, 4, 2)),
    }
    found["splits"] = Plan(Tile(32, 16, 4, 2), splits=3)
    if group > 1:
        found["pack"] = Plan(Tile(16, 16, 4, 2), pack=True)
        found["pack splits"] = Plan(Tile(16, 32, 4, 2), pack=True, splits=7)
    if DEVICE == "cpu" or torch.cuda.get_device_capability() >= (9, 0):
        tile = Tile(16, 16, 4, 2)
        if takes_descriptors(a, tile):
            found["tma"] = Plan(tile, tma=True)
            found["tma splits"] = Plan(tile, splits=2, tma=True)
        special = Plan(Tile(128, 16, 4, 2), tma=True)
        if takes_descriptors(a, special.tile) and can_specialize(a, special, CHIPS["H100"]):
            found["specialize"] = special._replace(specialize=True)
    return found


#: Calls that have what the kernel treats apart: window edges on both sides, a tail, absent keys, pages.
SHAPED: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("dense", {"causal": True}),
    "full": ("dense", {}),
    "band": ("dense", {"window": (20, 5)}),
    "left": ("dense", {"window": (9, None)}),
    "softcap": ("dense", {"softcap": 5.0, "causal": True, "sinks": torch.tensor([0.5, -1.0])}),
    "alibi": ("dense", {"alibi_slopes": torch.tensor([0.5, 0.1]), "causal": True}),
    "scale": ("dense", {"scale": -0.3}),
    "cache": ("cache", {"causal": True}),
    "pages": ("paged", {"causal": True}),
    "packed": ("packed", {"causal": True}),
}


def shaped(name: str, dtype: torch.dtype) -> Case:
    layout, options = SHAPED[name]
    g = torch.Generator().manual_seed(1)
    batch = 1 if layout == "dense" else 2
    q = torch.randn(batch, 37, 2, 16, generator=g).to(dtype)
    k, v = (torch.randn(batch, 64, 1, n, generator=g).to(dtype) for n in (16, 32))
    options = options | {"return_lse": True}
    if layout == "cache":
        options["cache_seqlens"] = int32([64, 21])
        k[1, 21:] = v[1, 21:] = torch.nan
    elif layout == "paged":
        k, v = (t.view(8, 16, *t.shape[2:]).flip(0).contiguous() for t in (k, v))
        options |= {"block_table": int32([[7, 6, 5, 4], [3, 2, 1, 0]])}
        options |= {"cache_seqlens": int32([64, 21])}
        k[2, 5:] = v[2, 5:] = torch.nan
    elif layout == "packed":
        options |= {"cu_seqlens_q": int32([0, 37, 43]), "cu_seqlens_k": int32([0, 64, 90])}
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        k[90:] = v[90:] = torch.nan
    return Case(q, k, v, options)


@pytest.mark.parametrize("name", SHAPED)
def test_every_plan(name: str) -> None:
    from fastattn.triton_ops.attention import run

    case = shaped(name, torch.float16)
    plans = variants(case)
    assert {"plain", "splits", "pack splits"} <= plans.keys()
    assert DEVICE == "cuda" or "tma" in plans
    assert DEVICE == "cuda" or name in ("cache", "pages", "packed") or "specialize" in plans
    for plan in plans.values():
        assert_matches(case, *run(device_args(case), plan))


# ---------------------------------------------------------------------------------- particular behaviours
@pytest.mark.parametrize("stored", ["int8", "float8_e4m3fn", "float8_e5m2", "float16", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_stored_in_another_type(dtype: torch.dtype, stored: str) -> None:
    """Keys and values in another type, with a scale for each KV head."""
    if DEVICE == "cuda" and stored.startswith("float8") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU converts no float8")
    kind = getattr(torch, stored)
    unit = 0.02 if stored == "int8" else 0.5
    k, v = ((torch.randn(2, 40, 2, 32) / unit).to(kind) for _ in range(2))
    scales = {name: torch.tensor([unit, 2 * unit]) for name in ("k_scale", "v_scale")}
    check(Case(torch.randn(2, 7, 4, 32).to(dtype), k, v, {"causal": True, **scales}))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 3)}], ids=str)
def test_scales_of_keys_of_any_sign(options: dict[str, Any]) -> None:
    """A factor of 0 makes no NaN of scores that are not visible, a negative one turns the order round."""
    k, v = ((torch.randn(2, 40, 2, 32) * 50).to(torch.int8) for _ in range(2))
    scales = {"k_scale": torch.tensor([0.0, -0.02]), "v_scale": torch.tensor([-0.02, 0.0])}
    check(Case(torch.randn(2, 37, 4, 32).half(), k, v, {**options, **scales, "return_lse": True}))


def test_heads_two_gigabytes_apart() -> None:
    """Offsets of heads do not fit 32 bits where their strides do; memory never touched costs nothing."""
    from fastattn.triton_ops.attention import run
    from fastattn.triton_ops.plan import Plan
    from fastattn.triton_ops.tiles import Tile

    apart = 1 << 30
    storage = torch.empty(2 * apart + 1000, dtype=torch.int8)
    k = storage.as_strided((1, 20, 3, 16), (1000, 16, apart, 1))
    mask = storage.view(torch.bool).as_strided((1, 3, 7, 20), (1000, apart, 20, 1), 400)
    k.copy_(torch.randn(k.shape) * 50)
    mask.copy_(torch.rand(mask.shape) < 0.7)
    scales = {f"{name}_scale": torch.full((3,), 0.02) for name in "kv"}
    case = Case(torch.randn(1, 7, 3, 16).half(), k, k, {"attn_mask": mask, **scales})
    assert_matches(case, run(device_args(case), Plan(Tile(16, 16, 4, 2)))[0], None)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_as_torch_is_asked(precision: str) -> None:
    """`torch.set_float32_matmul_precision` chooses among ieee, tf32x3 and tf32."""
    from fastattn.triton_ops.attention import launches
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.plan import plan

    q, k = torch.randn(1, 20, 2, 64), torch.randn(1, 33, 2, 64)
    a = build_args(on_device(q), on_device(k), on_device(k))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        out = fastattn.attention(a.q, a.k, a.v, backend="triton")
        used = launches(a, plan(a, CHIPS["A100"]), out, out.new_empty(0))[0].constants
    finally:
        torch.set_float32_matmul_precision(before)
    assert {"high": "tf32x3", "medium": "tf32"}[precision] in used
    exact = fastattn.attention(q, k, k, backend="reference")
    torch.testing.assert_close(out.cpu(), exact, rtol=0, atol=1e-5 if precision == "high" else 5e-3)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"),
    reason="before torch 2.9 there is one way",
)
@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_float32_as_torch_is_asked_in_its_newer_way(asked: str) -> None:
    """ieee after all that the older way can ask; tf32 alone, for which the older way's getter raises."""
    from fastattn.triton_ops.attention import launches
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.plan import plan

    q = torch.randn(1, 20, 2, 64, device=DEVICE)
    a = build_args(q, q, q)
    before = torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if asked == "ieee" else "highest")
        torch.backends.cuda.matmul.fp32_precision = asked
        (made,) = launches(a, plan(a, CHIPS["A100"])._replace(splits=1), q, q.new_empty(0))
    finally:
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cuda.matmul.fp32_precision = before[0]
    assert asked in made.constants


def test_wrong_indices_stay_inside() -> None:
    """Pages, lengths and rows out of range are clamped on the device."""
    from fastattn.triton_ops.attention import attention

    q, pages = torch.randn(2, 3, 2, 16), torch.randn(4, 8, 1, 16)
    wild = {"block_table": int32([[0, 99], [-7, 2]]), "cache_seqlens": int32([16, 1000])}
    tame = {"block_table": int32([[0, 3], [0, 2]]), "cache_seqlens": int32([16, 16])}
    results = [attention(device_args(Case(q, pages, pages, o)))[0].cpu() for o in (wild, tame)]
    assert torch.equal(*results)
    rows = torch.randn(3, 8, 1, 16)
    wild = {
        "cache_batch_idx": int32([7, -1]),
        "cache_seqlens": int32([-5, 90]),
        "cache_leftpad": int32([4, -2]),
    }
    tame = {"cache_batch_idx": int32([2, 0]), "cache_seqlens": int32([0, 8]), "cache_leftpad": int32([0, 0])}
    results = [attention(device_args(Case(q, rows, rows, o)))[0].cpu() for o in (wild, tame)]
    assert torch.equal(*results)
    packed_q, packed_k = torch.randn(6, 2, 16), torch.randn(9, 1, 16)
    wild = {"cu_seqlens_q": int32([0, 4, 50]), "cu_seqlens_k": int32([-3, 5, 77])}
    tame = {"cu_seqlens_q": int32([0, 4, 6]), "cu_seqlens_k": int32([0, 5, 9])}
    results = [attention(device_args(Case(packed_q, packed_k, packed_k, o)))[0].cpu() for o in (wild, tame)]
    assert torch.equal(*results)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a device indices are clamped")
def test_wrong_indices_on_the_cpu_are_refused() -> None:
    q, pages = torch.randn(1, 3, 2, 16), torch.randn(4, 8, 1, 16)
    with pytest.raises(ValueError, match=r"block_table\[0\]: values 9..9, expected 0..3"):
        fastattn.attention(
            q, pages, pages, block_table=int32([[9]]), cache_seqlens=int32([5]), backend="triton"
        )


def test_refusals() -> None:
    """What the kernels cannot do is refused by name, with what is accepted."""
    q = torch.randn(1, 3, 2, 300, device=DEVICE)
    with pytest.raises(UnsupportedError, match="head_dim 300 of q, 300 of v, it takes at most 256"):
        fastattn.attention(q, q, q, backend="triton")
    q = torch.randn(1, 3, 2, 16, device=DEVICE, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"dtype torch.float64, it takes torch.float32"):
        fastattn.attention(q, q, q, backend="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_graph(layout: str) -> None:
    """A captured call, replayed on other contents, equals the call itself."""
    from fastattn.triton_ops.attention import attention

    a = device_args(random_case(3, layout, torch.float16, 64))
    for _ in range(2):
        attention(a)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention(a)
    a.q.normal_()
    graph.replay()
    assert torch.equal(out, attention(a)[0])
