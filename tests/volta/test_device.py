"""The whole backend on a device: in the emulator, and the same on a GPU where there is one.

On a Volta the GPU's half runs the cubins; on a newer GPU their PTX, whatever FASTATTN_VOLTA_PTX says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from cuda_volta import catalog, emulator
from fastattn import dispatch, ops, reference, reference_ops
from fastattn.backends import torch_ops, volta
from fastattn.quant import packed
from fastattn.settings import Settings
from fastattn.spec import (
    AppendKvArgs,
    EmbeddingArgs,
    LinearArgs,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)
from tests.api.cases import HEAD_DIMS, LAYOUTS, Case, assert_accurate, random_case, torch_math
from tests.ops.runners import random as values
from tests.ops.weights import make

F16 = torch.float16
WEIGHTS = {
    "float16": {"bias": F16},
    "int4": {"group": 32, "offset": 16, "bias": torch.float32},
    "int4 act-order": {"group": 32, "x_perm": True},
    "int4 scattered": {"group": 32, "g_idx": True},
    "int8": {"group": 64, "mins": False},
}


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.toolchain, id="emulated"),
        pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the backend runs; every call below names it, so that nothing can fall back."""
    if request.param == "cpu":
        request.getfixturevalue("emulated")
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    request.getfixturevalue("on_newer_gpus")
    yield torch.device("cuda", torch.cuda.current_device())


def moved(value: Any, device: torch.device) -> Any:
    """The same record, its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PackedWeight):
        return packed.to_device(value, device)
    if isinstance(value, dict):
        return {k: moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    return value


# --------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention(layout: str, device: torch.device) -> None:
    """Random calls of each layout against the float64 oracle; on a GPU many, in the emulator a few."""
    dims = random.Random(layout)  # noqa: S311
    for seed in range(3 if device.type == "cpu" else 100):
        case = random_case(seed, layout, F16, dims.choice(HEAD_DIMS))
        args = case.args()
        exact, yardstick = reference.attention(args), torch_math(args)
        there: Case = moved(case, device)
        result = fastattn.attention(there.q, there.k, there.v, **there.options, backend="volta")
        for ours, theirs, oracle in zip(
            result if isinstance(result, tuple) else (result,), yardstick, exact, strict=False
        ):
            assert_accurate(ours.cpu(), theirs, oracle, case)


# ----------------------------------------------------------------------------------------------- small ops
def check(op: str, args: Any, device: torch.device) -> None:
    """The op against its oracle; the yardstick is plain torch in the same dtype."""
    there = moved(args, device)
    assert not dispatch.reasons_against("volta", op, there.signature())
    ours = dispatch.run(op, there, "volta")
    exact, theirs = getattr(reference_ops, op)(args), torch_ops.OPS[op].run(args)
    for a, b, c in zip(*(r if isinstance(r, tuple) else (r,) for r in (ours, theirs, exact)), strict=True):
        assert_accurate(a.cpu(), b, c, op)


def tables(positions: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions), 1e4 ** -(torch.arange(half) / half)).float()
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(device: torch.device, interleaved: bool) -> None:
    positions = torch.tensor([0, 63, 5, 5, 17])
    x = values(5, 3, 40, seed=1, dtype=F16)
    check("rotary", RotaryArgs(x, *tables(64, 16), positions, interleaved), device)


@pytest.mark.parametrize("rotated", [False, True])
def test_append(device: torch.device, rotated: bool) -> None:
    caches = [values(4, 8, 2, d, seed=d, dtype=F16) for d in (24, 40)]
    k, v = (values(6, 2, d, seed=d + 1, dtype=F16) for d in (24, 40))
    slots = torch.tensor([31, 0, -1, 8, 9, 17])
    cos, sin = tables(64, 12)
    table = {"cos": cos, "sin": sin, "positions": torch.arange(6) * 7} if rotated else {}
    args = AppendKvArgs(*caches, k, v, slots, **table)
    exact = reference_ops.append_kv(args)
    there = moved(args._replace(k_cache=caches[0].clone(), v_cache=caches[1].clone()), device)
    dispatch.run("append_kv", there, "volta")
    torch_ops.append_kv(args)
    for a, b, c in zip((there.k_cache, there.v_cache), caches, exact, strict=True):
        assert_accurate(a.cpu(), b, c, "append_kv")


@pytest.mark.parametrize("width", [8, 100, 576])
def test_rms_norm_and_swiglu(device: torch.device, width: int) -> None:
    x, residual = (values(5, width, seed=s, dtype=F16) for s in (1, 2))
    weight = values(width, seed=3, dtype=F16)
    check("rms_norm", RmsNormArgs(x, weight, 1e-5, residual), device)
    check("swiglu", SwigluArgs(x), device)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("rows", [1, 19])
def test_linear_and_embedding(device: torch.device, kind: str, rows: int) -> None:
    weight = make(kind.split(maxsplit=1)[0], 72, 192, **WEIGHTS[kind])
    check("linear", LinearArgs(values(rows, 192, seed=rows, dtype=F16), weight), device)
    ids = torch.tensor([71, 0, 5, 5])
    check("embedding", EmbeddingArgs(ids, weight._replace(bias=None), F16), device)


# --------------------------------------------------------------------------------------------- GPUs alone
@pytest.fixture
def on_newer_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What FASTATTN_VOLTA_PTX=1 allows."""
    caches: tuple[Any, ...] = (dispatch.load_backend, dispatch.unavailable, dispatch.op_table)
    monkeypatch.setattr(volta, "settings", Settings(volta_ptx=True))
    monkeypatch.setattr(dispatch, "_resolved", {})
    for cache in caches:
        cache.cache_clear()
    if reasons := volta.BACKEND.available():
        pytest.skip("; ".join(reasons))
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("on_newer_gpus")
def test_a_cuda_graph_captures_every_op() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    step = _step(device)
    ids = torch.tensor([3, 0, 71, 3], device=device)
    step(ids)  # kernels may be loaded during a capture, cuBLAS's workspace may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(ids)
    for first in (5, 40):
        ids.copy_(torch.arange(first, first + 4))
        graph.replay()
        assert all(map(torch.equal, captured, step(ids)))


def _step(device: torch.device) -> Callable[[Tensor], list[Tensor]]:
    """Something like a layer's decoding step: every op of the backend, each row its own sequence; then the
    attention of a prompt, and a product and an attention that are cut into splits.
    """
    shapes = {"tokens": (72, 64), "qkv": (128, 64), "mlp": (128, 64), "wide": (64, 1024)}
    weight = {
        name: moved(make("int4", *shape, g_idx=name == "mlp", x_perm=name == "wide"), device)
        for name, shape in shapes.items()
    }
    long_k, long_v = (values(1, 4096, 1, 16, seed=s, dtype=F16).to(device) for s in (6, 7))
    norm = torch.ones(64, dtype=F16, device=device)
    k_cache, v_cache = (values(8, 16, 2, 16, seed=s, dtype=F16).to(device) for s in (4, 5))
    table = torch.arange(8, dtype=torch.int32, device=device).view(4, 2)
    lengths = torch.tensor([3, 17, 32, 1], dtype=torch.int32, device=device)
    cos, sin = (t.to(device) for t in tables(64, 8))
    positions = lengths.long() - 1
    slots = table.long()[torch.arange(4, device=device), positions // 16] * 16 + positions % 16

    def run(ids: Tensor) -> list[Tensor]:
        x = ops.embedding(ids, weight["tokens"], F16, backend="volta")
        normed, _ = ops.rms_norm(x, norm, 1e-5, backend="volta")
        q, k, v = ops.linear(normed, weight["qkv"], backend="volta").view(4, 8, 16).split((4, 2, 2), dim=1)
        q = ops.rotary(q, cos, sin, positions, backend="volta")
        ops.append_kv(k_cache, v_cache, k, v, slots, cos=cos, sin=sin, positions=positions, backend="volta")
        out = fastattn.attention(
            q[:, None], k_cache, v_cache, causal=True, block_table=table, cache_seqlens=lengths,
            backend="volta",
        )  # fmt: skip
        assert isinstance(out, Tensor)
        normed, _ = ops.rms_norm(out.reshape(4, 64), norm, 1e-5, x, backend="volta")
        gated = ops.swiglu(ops.linear(normed, weight["mlp"], backend="volta"), backend="volta")
        prompt = gated.view(1, 16, 4, 4).repeat_interleave(4, dim=-1)  # (1, 16, 4, 16): prefill's kernel
        mixed = fastattn.attention(prompt, prompt[:, :, :2], prompt[:, :, 2:], causal=True, backend="volta")
        assert isinstance(mixed, Tensor)
        one = ops.linear(mixed.view(1, 1024) / 256, weight["wide"], backend="volta").view(1, 1, 4, 16)
        far = fastattn.attention(one / 64, long_k, long_v, backend="volta")
        assert isinstance(far, Tensor)
        return [gated, mixed, one, far]

    return run


@pytest.mark.toolchain
@pytest.mark.usefixtures("emulated")
def test_the_captured_step_is_right() -> None:
    """The step that the graph captures, in the emulator against the CPU's backend, op by op the same."""
    ids = torch.tensor([3, 0, 71, 3])
    with emulator.record() as reports:
        ours = _step(torch.device("cpu"))(ids)
    assert {r.variant.entry for r in reports} == {v.entry for v in catalog.variants()}
    with pytest.MonkeyPatch.context() as patch:
        table = {name: dispatch.op_table("cpu")[name] for name in dispatch.op_table("volta")}
        patch.setattr(dispatch, "op_table", lambda name: table)
        patch.setattr(dispatch, "_resolved", {})
        theirs = _step(torch.device("cpu"))(ids)
    # Each op rounds to float16; of a product of two such results the largest value sets the scale.
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 4e-3 * b.abs().max()
