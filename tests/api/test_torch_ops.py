"""The torch ops: opcheck, fake kernels, full-graph torch.compile, inference mode, refusal of autograd."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import mark_dynamic
from torch._dynamo.exc import Unsupported
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn import UnsupportedError, dispatch, ops
from fastattn.quant import packed

from .cases import LAYOUTS, int32, random_case


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------- opcheck
def attention_sample(layout: str, seed: int) -> tuple[Any, ...]:
    a = random_case(seed, layout, torch.float32, 16).args()
    clean = [t.nan_to_num() if isinstance(t, Tensor) and t.is_floating_point() else t for t in a]
    return (*clean[:5], *a.window, *clean[6:], "reference")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_attention(layout: str, seed: int) -> None:
    torch.library.opcheck(torch.ops.fastattn.attention.default, attention_sample(layout, seed))


def cos_sin(length: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(length, half) * 6
    return angle.cos(), angle.sin()


def int4_weight() -> Any:
    codes = torch.randint(0, 16, (24, 64), dtype=torch.uint8)
    return packed.pack_int4(codes, torch.rand(24, 2), -torch.rand(24, 2), 32)


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Arguments of every other op, in several configurations; made anew for each test."""
    f = torch.ops.fastattn
    cache = lambda: torch.zeros(3, 4, 2, 16)  # noqa: E731
    k, slots, positions = torch.randn(5, 2, 16), torch.tensor([0, 3, 11, -1, 5]), torch.arange(5)
    plain = (None, None, None, False, "nhd", None, None, "")
    x = torch.randn(6, 64)
    w = int4_weight()
    names = ",".join(w.tensors)
    linear = (list(w.tensors.values()), names, w.format, 24, 64, w.group_size, 0, None, None)
    dense = ([torch.randn(24, 64)], "weight", "dense", 24, 64, 0, 0, None, None)
    codes, scales = ops.mx_pack(x, "e2m1")
    return {
        "append": (f.append_kv, (cache(), cache(), k, k, slots, *plain)),
        "append-rotary": (
            f.append_kv,
            (cache(), cache(), k, k, slots, *cos_sin(9, 4), positions, True, "nhd", None, None, ""),
        ),
        "rotary": (f.rotary, (k, *cos_sin(9, 8), positions, False, "")),
        "rotary-interleaved": (f.rotary, (k, *cos_sin(9, 4), positions, True, "")),
        "norm": (f.rms_norm, (x, torch.randn(64), 1e-5, None, "")),
        "norm-residual": (f.rms_norm, (x, torch.randn(64), 1e-5, torch.randn(6, 64), "")),
        "norm-bfloat16": (f.rms_norm, (x.bfloat16(), torch.randn(64), 1e-5, None, "sdpa")),
        "swiglu": (f.swiglu, (x, "")),
        "linear-dense": (f.linear, (x, *dense, None, "", "")),
        "linear-int4": (f.linear, (x, *linear, torch.randn(24), "", "")),
        "linear-int4-sdpa": (f.linear, (x, *linear, None, "", "sdpa")),
        "embedding": (f.embedding, (torch.tensor([3, 0, 23]), *linear, torch.bfloat16, "")),
        "embedding-sdpa": (f.embedding, (torch.tensor([3]), *dense, torch.float32, "sdpa")),
        "mx-pack": (f.mx_pack, (x, "e2m1", 32, "floor", False, "")),
        "mx-pack-6-bits": (f.mx_pack, (x[:, :50], "e3m2", 32, "even", False, "")),
        "mx-pack-search": (f.mx_pack, (x[:, :50], "e1m1", 16, "fp16", True, "")),
        "mx-unpack": (f.mx_unpack, (codes, scales, "e2m1", 32, 64, torch.bfloat16, "floor", "")),
    }


@pytest.mark.parametrize("name", samples())
def test_opcheck(name: str) -> None:
    op, args = samples()[name]
    torch.library.opcheck(op.default, args)


def test_every_op_has_a_sample() -> None:
    schemas = torch._C._jit_get_all_schemas()  # noqa: SLF001
    tested = {str(op).replace(".", "::") for op, _ in samples().values()} | {"fastattn::attention"}
    defined = {s.name for s in schemas if s.name.startswith("fastattn::")}
    assert tested == defined


@pytest.mark.parametrize("name", samples())
def test_fake_kernel_has_the_real_shape(name: str) -> None:
    op, args = samples()[name]
    if op is torch.ops.fastattn.append_kv:
        assert op(*args) is None
    real = op(*args)
    with FakeTensorMode() as mode:
        fake_args = [
            [mode.from_tensor(t) for t in a] if isinstance(a, list)
            else mode.from_tensor(a) if isinstance(a, Tensor) else a
            for a in args
        ]  # fmt: skip
        fake = op(*fake_args)
    for r, f in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True):
        if r is not None:
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


# ----------------------------------------------------------------------------------------------- compile
def half_block(x: Tensor, caches: tuple[Tensor, Tensor], w: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Norm, projection, rotary append, paged attention, gate: every op that a decoder layer runs."""
    rows = x.shape[0]
    h, _ = ops.rms_norm(x, w["norm"], 1e-5)
    qkv = ops.linear(h, w["qkv"]).unflatten(-1, (-1, 16))
    q, k, v = qkv.split((4, 2, 2), 1)
    positions = torch.arange(rows, device=x.device)
    cos, sin = w["cos_sin"]
    q = ops.rotary(q, cos, sin, positions)
    ops.append_kv(*caches, k, v, positions + 4, cos=cos, sin=sin, positions=positions)
    out, lse = fastattn.attention(
        q, *caches, causal=True, cu_seqlens_q=w["cu"], block_table=w["table"], cache_seqlens=w["used"],
        return_lse=True,
    )  # fmt: skip
    h, residual = ops.rms_norm(ops.linear(out.flatten(1), w["out"]), w["norm"], 1e-5, x)
    return residual + ops.swiglu(torch.cat((h, h), -1)), lse


def half_block_inputs(rows: int = 6) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
    g = torch.Generator().manual_seed(rows)
    weights = {
        "norm": torch.rand(64, generator=g),
        "qkv": packed.dense(torch.randn(128, 64, generator=g)),
        "out": packed.dense(torch.randn(64, 64, generator=g)),
        "cos_sin": (torch.ones(16, 8), torch.zeros(16, 8)),
        "cu": int32([0, rows]),
        "table": int32([[1, 2, 3]]),
        "used": int32([rows]),
    }
    return torch.randn(rows, 64, generator=g), (torch.zeros(5, 4, 2, 16), torch.zeros(5, 4, 2, 16)), weights


def assert_compiles(compiler: str, function: Callable[..., Any], inputs: Callable[[], Any]) -> None:
    """Compiled with a full graph, it gives what it gives eagerly, results and caches alike."""
    eager, compiled = inputs(), inputs()
    with torch.inference_mode():
        expected = function(*eager)
        got = torch.compile(function, fullgraph=True, backend=compiler)(*compiled)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled[1], eager[1])


def test_compile() -> None:
    assert_compiles("aot_eager", half_block, half_block_inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # inside torch
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_compile_inductor() -> None:
    assert_compiles("inductor", half_block, half_block_inputs)


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_compiled_code_obeys_use_backend(name: str) -> None:
    """The backend is resolved when the compiled code runs, not when it was traced."""
    q = torch.randn(2, 5, 4, 16)

    def plain(q: Tensor) -> Any:
        return fastattn.attention(q, q, q, causal=True)

    with torch.inference_mode():
        compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
        automatic = compiled(q)
        before = dispatch.calls[name, "attention"]
        with fastattn.use_backend(name):
            torch.testing.assert_close(compiled(q), automatic)
        assert dispatch.calls[name, "attention"] == before + 1


def test_use_backend_inside_a_full_graph_is_refused_aloud() -> None:
    """A context variable cannot be traced: torch says so, and the block is not silently dropped."""
    q = torch.randn(1, 3, 2, 8)

    def inside(q: Tensor) -> Any:
        with fastattn.use_backend("reference"):
            return fastattn.attention(q, q, q)

    with torch.inference_mode():
        with pytest.raises(Unsupported, match="ContextVar"):
            torch.compile(inside, fullgraph=True, backend="aot_eager")(q)
        before = dispatch.calls["reference", "attention"]
        torch.compile(inside, backend="aot_eager")(q)
        assert dispatch.calls["reference", "attention"] == before + 1


def test_compile_backend_argument() -> None:
    q = torch.randn(1, 3, 2, 8)
    before = dispatch.calls["reference", "attention"]
    with torch.inference_mode():
        torch.compile(
            lambda q: fastattn.attention(q, q, q, backend="reference"), fullgraph=True, backend="aot_eager"
        )(q)
    assert dispatch.calls["reference", "attention"] == before + 1


def test_compile_dynamic_lengths_once() -> None:
    """One graph serves every length that was marked dynamic."""

    def both(q: Tensor, k: Tensor) -> Any:
        return fastattn.attention(q, k, k, causal=True, window=(3, None), return_lse=True)

    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(both, fullgraph=True, backend=counting)
    with torch.inference_mode():
        for q_len, k_len in ((5, 7), (6, 11), (2, 30)):
            q, k = torch.randn(2, q_len, 4, 16), torch.randn(2, k_len, 2, 16)
            mark_dynamic(q, 1)
            mark_dynamic(k, 1)
            torch.testing.assert_close(compiled(q, k), both(q, k))
    assert len(graphs) == 1


@pytest.mark.parametrize("rotary", [False, True])
def test_compile_kvcache(rotary: bool) -> None:
    def inputs() -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(3)
        q, k = torch.randn(2, 3, 4, 16, generator=g), torch.randn(2, 3, 2, 16, generator=g)
        return q, (torch.zeros(2, 9, 2, 16), torch.zeros(2, 9, 2, 16)), k, int32([2, 5])

    def step(q: Tensor, caches: tuple[Tensor, Tensor], k: Tensor, used: Tensor) -> Any:
        angles = (torch.ones(20, 8), torch.zeros(20, 8)) if rotary else (None, None)
        return fastattn.flash_attn_with_kvcache(q, *caches, k, k, *angles, cache_seqlens=used, causal=True)

    assert_compiles("aot_eager", step, inputs)


def test_compile_varlen() -> None:
    def inputs() -> tuple[Any, ...]:
        g = torch.Generator().manual_seed(3)
        return torch.randn(9, 4, 16, generator=g), torch.randn(9, 2, 16, generator=g), int32([0, 4, 9])

    def varlen(q: Tensor, k: Tensor, cu: Tensor) -> Any:
        return fastattn.flash_attn_varlen_func(q, k, k, cu, cu, 5, 5, causal=True, softcap=3.0)

    assert_compiles("aot_eager", varlen, inputs)


# ----------------------------------------------------------------------------------- autograd, inference mode
def grad_calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    """The tensor that requires grad, as the error must name it, and the call."""
    q, k = torch.randn(1, 3, 2, 8), torch.randn(3, 2, 8)
    learned = lambda *shape: torch.randn(shape, requires_grad=True)  # noqa: E731
    cos, at = torch.ones(4, 4), torch.arange(3)
    cache = torch.zeros(1, 4, 2, 8)
    return {
        "attention-q": ("q", lambda: fastattn.attention(learned(1, 3, 2, 8), q, q)),
        "attention-v": ("v", lambda: fastattn.attention(q, q, learned(1, 3, 2, 8))),
        "attention-sinks": ("sinks", lambda: fastattn.attention(q, q, q, sinks=learned(2))),
        "attention-mask": ("attn_mask", lambda: fastattn.attention(q, q, q, attn_mask=learned(3, 3))),
        "flash_attn": ("k", lambda: fastattn.flash_attn_func(q, learned(1, 3, 2, 8), q)),
        "append": ("v", lambda: ops.append_kv(cache, cache.clone(), k, learned(3, 2, 8), at)),
        "rotary": ("x", lambda: ops.rotary(learned(3, 2, 8), cos, cos, at)),
        "norm": ("weight", lambda: ops.rms_norm(torch.randn(2, 8), learned(8), 1e-5)),
        "swiglu": ("x", lambda: ops.swiglu(learned(2, 8))),
        "linear": ("weight", lambda: ops.linear(torch.randn(2, 8), packed.dense(learned(4, 8)))),
    }


@pytest.mark.parametrize("name", grad_calls())
def test_autograd_is_refused(name: str) -> None:
    tensor, call = grad_calls()[name]
    with pytest.raises(UnsupportedError, match=rf"^{tensor}: requires grad; .*no_grad"):
        call()
    with torch.no_grad():
        call()


def test_inference_tensors() -> None:
    """Tensors made in inference mode, caches among them, work inside it and (read-only) outside."""
    with torch.inference_mode():
        x, caches, weights = half_block_inputs()
        half_block(x, caches, weights)
        q = torch.randn(1, 3, 2, 8)
    assert fastattn.attention(q, q, q).shape == q.shape


CACHE, ROWS, AT = torch.zeros(2, 4, 2, 8), torch.ones(3, 2, 8), torch.arange(3)
BAD_CALLS = [
    (lambda: ops.append_kv(CACHE, CACHE, ROWS, ROWS[:2], AT), r"v: \(2, 2, 8\)"),
    (lambda: ops.append_kv(CACHE, CACHE, ROWS[:, :1], ROWS, AT), r"k: \(3, 1, 8\)"),
    (
        lambda: ops.append_kv(CACHE, CACHE, ROWS.half(), ROWS, AT),
        "k: torch.float16, k_cache is torch.float32",
    ),
    (lambda: ops.append_kv(CACHE, CACHE[:1], ROWS, ROWS, AT), r"v_cache: \(1, 4, 2, 8\), k_cache is"),
    (lambda: ops.append_kv(CACHE, CACHE, ROWS, ROWS, AT.int()), "slots: torch.int32, expected int64"),
    (lambda: ops.append_kv(CACHE, CACHE, ROWS, ROWS, AT + 6), "slots"),
    (lambda: ops.append_kv(CACHE, CACHE, ROWS, ROWS, AT, cos=torch.ones(3, 4)), "cos, sin and positions"),
    (lambda: ops.rotary(ROWS, torch.ones(4, 5), torch.ones(4, 5), AT), "cos, sin"),
    (lambda: ops.rotary(ROWS, torch.ones(4, 4), torch.ones(4, 4), AT[:2]), "positions"),
    (lambda: ops.rotary(ROWS, torch.ones(2, 4), torch.ones(2, 4), AT), "positions"),
    (lambda: ops.rotary(ROWS[0], torch.ones(4, 4), torch.ones(4, 4), AT), r"x: \(2, 8\), expected \(N"),
    (lambda: ops.rms_norm(ROWS, torch.ones(7), 1e-5), r"weight: \(7,\), expected \(8,\)"),
    (lambda: ops.rms_norm(ROWS, torch.ones(8), 1e-5, ROWS[:2]), "residual"),
    (lambda: ops.rms_norm(ROWS, torch.ones(8), -5.0), r"eps: -5\.0, expected a finite number >= 0"),
    (lambda: ops.rms_norm(ROWS, torch.ones(8), float("nan")), "eps: nan"),
    (lambda: ops.rms_norm(torch.tensor(1.0), torch.tensor(1.0), 1e-5), "x: a scalar"),
    (lambda: ops.rms_norm(ROWS.int(), torch.ones(8), 1e-5), "x: torch.int32, expected one of torch.float32"),
    (lambda: ops.rotary(ROWS.int(), torch.ones(4, 4), torch.ones(4, 4), AT), "x: torch.int32"),
    (lambda: ops.swiglu(torch.tensor(1.0)), "x: a scalar"),
    (lambda: ops.swiglu(torch.ones(3, 8, dtype=torch.int32)), "x: torch.int32"),
    (lambda: ops.swiglu(torch.ones(3, 7)), "x: last dimension 7"),
    (lambda: ops.linear(torch.ones(3, 7), packed.dense(torch.ones(4, 8))), r"x: \(3, 7\), expected \(N, 8\)"),
    (lambda: ops.linear(torch.ones(3, 8), packed.dense(torch.ones(4, 8)), act="fp8"), "act: 'fp8'"),
    (lambda: ops.mx_pack(torch.ones(4), "e9m9"), "element: 'e9m9'"),
    (lambda: ops.mx_pack(torch.ones(4), "e2m1", 0), "block: 0"),
    (lambda: ops.mx_pack(torch.ones(4), "e2m1", scale="up"), "scale: 'up'"),
    (lambda: ops.mx_unpack(torch.ones(4).byte(), torch.ones(1).byte(), "e2m1", 9), "codes, scales"),
    (
        lambda: ops.mx_unpack(torch.ones(4).byte(), torch.ones(1).byte(), "e2m1", -1),
        "n: -1, expected at least 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_input_names_the_argument(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
