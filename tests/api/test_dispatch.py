"""Which backend runs a call: default deny, forced or refused, contexts, counters, settings and errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextvars import copy_context
from typing import Any

import pytest
import torch

import fastattn
from fastattn import UnsupportedError, dispatch, ops
from fastattn.attention import build_args
from fastattn.settings import Settings
from fastattn.spec import AttentionArgs, Backend, Op

Q = torch.zeros(1, 3, 2, 8)


def ran(call: Any) -> list[tuple[str, str]]:
    """The (backend, op) pairs that the call ran."""
    before = dict(dispatch.calls)
    call()
    return [key for key, n in dispatch.calls.items() for _ in range(n - before.get(key, 0))]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the first automatic backend by one whose op, availability and reasons a test decides."""
    state: dict[str, Any] = {"unavailable": [], "reasons": [], "features": frozenset(), "page_sizes": ()}

    def attention(a: AttentionArgs) -> tuple[torch.Tensor, torch.Tensor]:
        return a.q + 1, a.q.new_empty(0)

    def table() -> dict[str, Op]:
        reasons = lambda signature: list(state["reasons"])  # noqa: E731
        return {"attention": Op(attention, state["features"], reasons, state["page_sizes"])}

    backend = Backend("volta", ("cpu",), lambda: state["unavailable"], table, dict)
    load = dispatch.load_backend
    monkeypatch.setattr(dispatch, "load_backend", lambda name: backend if name == "volta" else load(name))
    monkeypatch.setattr(dispatch, "unavailable", lambda name: tuple(dispatch.load_backend(name).available()))
    monkeypatch.setattr(dispatch, "op_table", lambda name: dispatch.load_backend(name).ops())
    monkeypatch.setattr(dispatch, "_resolved", {})
    return state


# ---------------------------------------------------------------------------------------------- default deny
def test_first_backend_without_a_reason_runs(toy: dict[str, Any]) -> None:
    assert ran(lambda: fastattn.attention(Q, Q, Q)) == [("volta", "attention")]


OPTIONS: dict[str, Any] = {
    "causal": True,
    "window": (2, None),
    "softcap": 2.0,
    "alibi_slopes": torch.ones(2),
    "sinks": torch.ones(2),
    "attn_mask": torch.ones(3, 3, dtype=torch.bool),
    "cache_seqlens": 2,
    "cache_batch_idx": torch.zeros(1, dtype=torch.int32),
    "cache_leftpad": torch.zeros(1, dtype=torch.int32),
    "q_pos0": torch.zeros(1, dtype=torch.int32),
    "k_pos0": torch.zeros(1, dtype=torch.int32),
    "kv_layout": "npu_nz",
    "k_scale": torch.ones(2),
    "v_scale": torch.ones(2),
    "return_lse": True,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_feature_not_named_is_a_reason(toy: dict[str, Any], option: str) -> None:
    """A kernel that does not name a field never sees a call that sets it; one that does, does."""
    args = build_args(Q, Q, Q, **{option: OPTIONS[option]})
    name = {"cache_seqlens": "seqused_k"}.get(option, option)
    assert dispatch.explain("attention", args.signature())["volta"] == [f"{name} is not supported"]
    toy["features"] = frozenset({name})
    assert dispatch.explain("attention", args.signature())["volta"] == []


def test_every_field_of_the_record_is_a_feature() -> None:
    """A field added to the record is denied by kernels that were written before it."""
    packed = {"cu_seqlens_q", "cu_seqlens_k", "block_table", "max_seqlen_q", "max_seqlen_k"}
    fields = {{"cache_seqlens": "seqused_k"}.get(n, n) for n in OPTIONS} | packed
    assert fields == set(AttentionArgs._field_defaults)


@pytest.mark.parametrize(("size", "reasons"), [(16, []), (24, ["page size 24, it takes 16, 128"])])
def test_page_size(toy: dict[str, Any], size: int, reasons: list[str]) -> None:
    toy |= {"page_sizes": (16, 128), "features": frozenset({"block_table", "seqused_k"})}
    pages = torch.zeros(4, size, 2, 8)
    args = build_args(Q, pages, pages, block_table=torch.zeros(1, 2, dtype=torch.int32), cache_seqlens=5)
    assert dispatch.explain("attention", args.signature())["volta"] == reasons


@pytest.mark.parametrize("why", ["unavailable", "reasons"])
def test_next_backend_takes_what_the_first_refuses(toy: dict[str, Any], why: str) -> None:
    toy[why] = ["not today"]
    ((name, _),) = ran(lambda: fastattn.attention(Q, Q, Q))
    assert name in ("cpu", "sdpa")


def test_exception_inside_a_kernel_propagates(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is not a reason: no other backend is tried."""

    def broken(a: AttentionArgs) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(dispatch, "op_table", lambda name: {"attention": Op(broken)})
    monkeypatch.setattr(dispatch, "_resolved", {})
    with pytest.raises(ZeroDivisionError, match="a bug"):
        fastattn.attention(Q, Q, Q)


# -------------------------------------------------------------------------------------------------- by name
def test_named_backend_is_used() -> None:
    for name in ("sdpa", "reference"):
        assert ran(lambda: fastattn.attention(Q, Q, Q, backend=name)) == [(name, "attention")]  # noqa: B023


def test_named_backend_is_refused_never_replaced() -> None:
    before = dict(dispatch.calls)
    with pytest.raises(UnsupportedError, match=r"'sdpa' was asked for(.|\n)*sinks is not supported"):
        fastattn.attention(Q, Q, Q, sinks=torch.ones(2), backend="sdpa")
    with pytest.raises(UnsupportedError, match=r"'volta' was asked for(.|\n)*'cpu', it runs on cuda"):
        fastattn.attention(Q, Q, Q, backend="volta")
    assert dict(dispatch.calls) == before


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match="no backend 'cuda'; there are: volta, ascend, triton, cpu, sdpa, reference"
    ):
        fastattn.attention(Q, Q, Q, backend="cuda")
    for unknown, name in (("cuda", "cuda"), ("", ""), ("cpu,", ""), ("cpu,cuda", "cuda"), (None, None)):
        with pytest.raises(ValueError, match=f"no backend {name!r}"), fastattn.use_backend(unknown):
            pass


def test_of_several_names_the_first_that_can_runs() -> None:
    plain, with_sinks = ({"backend": "sdpa,cpu", **o} for o in ({}, {"sinks": torch.ones(2)}))
    assert ran(lambda: fastattn.attention(Q, Q, Q, **plain)) == [("sdpa", "attention")]
    assert ran(lambda: fastattn.attention(Q, Q, Q, **with_sinks)) == [("cpu", "attention")]
    with fastattn.use_backend("triton,sdpa"):
        assert ran(lambda: fastattn.attention(Q, Q, Q)) == [("sdpa", "attention")]
        with pytest.raises(UnsupportedError, match=r"'triton,sdpa'(.|\n)*triton: (.|\n)*sdpa: sinks is not"):
            fastattn.attention(Q, Q, Q, sinks=torch.ones(2))


def test_use_backend_nests_and_ends() -> None:
    call = lambda: fastattn.attention(Q, Q, Q)  # noqa: E731
    automatic = ran(call)
    with fastattn.use_backend("reference"):
        assert ran(call) == [("reference", "attention")]
        with fastattn.use_backend("sdpa"):
            assert ran(call) == [("sdpa", "attention")]
            by_argument = lambda: fastattn.attention(Q, Q, Q, backend="reference")  # noqa: E731
            assert ran(by_argument) == [("reference", "attention")]
        assert ran(call) == [("reference", "attention")]
        with pytest.raises(RuntimeError), fastattn.use_backend("sdpa"):
            raise RuntimeError
        assert ran(call) == [("reference", "attention")]
    assert ran(call) == automatic


def test_use_backend_covers_every_op() -> None:
    with fastattn.use_backend("sdpa"):
        assert ran(lambda: ops.swiglu(torch.ones(2, 4))) == [("sdpa", "swiglu")]
        assert ran(lambda: ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)) == [("sdpa", "rms_norm")]


def test_use_backend_belongs_to_its_thread_and_context() -> None:
    seen: dict[str, str] = {}

    def name_in(key: str) -> None:
        seen[key] = dispatch._forced.get()  # noqa: SLF001

    with fastattn.use_backend("sdpa"):
        other = threading.Thread(target=name_in, args=("thread",))
        other.start()
        other.join()
        carried = copy_context()
    name_in("after")
    carried.run(name_in, "context")
    assert seen == {"thread": "", "after": "", "context": "sdpa"}


# ------------------------------------------------------------------------------------------ explain, errors
def test_explain_lists_every_backend() -> None:
    why = dispatch.explain("attention", build_args(Q, Q, Q, sinks=torch.ones(2)).signature())
    assert tuple(why) == dispatch.BACKENDS
    assert why["reference"] == []
    assert why["sdpa"] == ["sinks is not supported"]
    assert why["triton"][0] == "tensors are on 'cpu', it runs on cuda"
    assert any("Triton" in reason or "GPU" in reason for reason in why["triton"])


def test_error_gives_every_reason_of_every_backend() -> None:
    nz = {"kv_layout": "npu_nz", "sinks": torch.ones(2)}
    with pytest.raises(UnsupportedError) as caught:
        fastattn.attention(Q, Q, Q, **nz)
    why = dispatch.explain("attention", build_args(Q, Q, Q, **nz).signature())
    text = str(caught.value)
    assert text.startswith("attention: no backend is left, and cannot run this call:")
    for name in dispatch.AUTOMATIC:
        assert f"{name}: {'; '.join(why[name])}" in text


def test_resolution_is_cached_per_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = dispatch.resolve
    monkeypatch.setattr(dispatch, "resolve", lambda *key: asked.append(key) or original(*key))
    monkeypatch.setattr(dispatch, "_resolved", {})
    for length in (3, 4, 5):
        fastattn.attention(torch.zeros(1, length, 2, 8), Q, Q)
    assert len(asked) == 1
    fastattn.attention(Q, Q, Q, causal=True)
    fastattn.attention(Q.half(), Q.half(), Q.half())
    fastattn.attention(Q, Q, Q, backend="sdpa")
    with fastattn.use_backend("reference"):
        fastattn.attention(Q, Q, Q)
    assert len(asked) == 5


def test_a_cache_that_grows_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_resolved", {})
    row = torch.ones(1, 2, 8)
    for length in (1, 2, 3):
        cache = torch.zeros(1, length, 2, 8)
        ops.append_kv(cache, cache.clone(), row, row, torch.tensor([length - 1]), backend="sdpa")
    assert len(dispatch._resolved) == 1  # noqa: SLF001


def test_calls_are_counted() -> None:
    assert (
        ran(lambda: [fastattn.attention(Q, Q, Q, backend="sdpa") for _ in range(3)])
        == [("sdpa", "attention")] * 3
    )


# --------------------------------------------------------------------------------------------------- settings
def python(program: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


ATTEND = """
import torch, fastattn
from fastattn import dispatch
q = torch.zeros(1, 3, 2, 8)
fastattn.attention(q, q, q)
print(*dispatch.calls)
"""


def test_environment_variable_forces() -> None:
    """The first of those named that can run it."""
    result = python(ATTEND, FASTATTN_BACKEND="triton,reference")
    assert "('reference', 'attention')" in result.stdout, result.stderr


def test_environment_variable_refuses() -> None:
    result = python(ATTEND, FASTATTN_BACKEND="triton")
    assert result.returncode
    assert "backend 'triton' was asked for" in result.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("BACKEND", "cpu,cuda", "no backend 'cuda'; there are: volta, ascend"),
        ("STRICT", "maybe", "expected 0 or 1"),
    ],
)
def test_bad_environment_variable_is_the_first_calls_error(name: str, text: str, message: str) -> None:
    result = python(ATTEND, **{f"FASTATTN_{name}": text})
    assert f"ValueError: environment variable FASTATTN_{name}='{text}': {message}" in result.stderr
    assert "line 5, in <module>" in result.stderr, "the import passes"


STRICT = """
import torch, fastattn
q, k = torch.zeros(1, 1, 2, 8), torch.zeros(3, 4, 2, 8)
table = torch.tensor([[0, 7]], dtype=torch.int32)
fastattn.attention(q, k, k, block_table=table, cache_seqlens=3, backend="sdpa")
fastattn.attention(q, k, k, block_table=table, cache_seqlens=6, backend="sdpa")
"""


def test_strict_checks_indices() -> None:
    """Only pages that are in use count."""
    result = python(STRICT, FASTATTN_STRICT="1")
    assert result.stderr.strip().endswith("ValueError: block_table[0]: values 0..7, expected 0..2")
    assert "line 6, in <module>" in result.stderr, "the first call uses no such page"


@pytest.mark.parametrize(
    ("name", "text", "accepted"),
    [
        ("FASTATTN_STRICT", "maybe", "0 or 1"),
        ("FASTATTN_TIMEOUT", "soon", "seconds > 0"),
        ("FASTATTN_TIMEOUT", "-1", "seconds > 0"),
        ("FASTATTN_TIMEOUT", "nan", "seconds > 0"),
        ("FASTATTN_TIMEOUT", "inf", "seconds > 0"),
    ],
)
def test_bad_setting_names_the_variable(name: str, text: str, accepted: str) -> None:
    with pytest.raises(ValueError, match=f"environment variable {name}='{text}': expected {accepted}"):
        Settings.from_env({name: text})


def test_settings() -> None:
    assert Settings.from_env({}) == Settings()
    found = Settings.from_env(
        {"FASTATTN_STRICT": "yes", "FASTATTN_TIMEOUT": "2.5", "FASTATTN_BACKEND": "cpu"}
    )
    assert found == Settings(backend="cpu", strict=True, timeout_s=2.5)
    assert {name for name, _, _ in Settings.describe()} >= {"FASTATTN_BACKEND", "FASTATTN_STRICT"}
