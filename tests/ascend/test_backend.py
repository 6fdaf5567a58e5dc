"""The backend `ascend`: what it reports, which way it takes a call, what it refuses and why."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fastattn
from ascend_ops import launch
from ascend_ops.router import Invocation, chip_of
from fastattn import dispatch
from fastattn.attention import build_args
from fastattn.backends import ascend, ascend_small
from fastattn.settings import Settings
from fastattn.spec import AttentionArgs, UnsupportedError
from tests.ops.weights import make


def args(dtype: torch.dtype = torch.float16, d: int = 64, page: int = 0, **options: Any) -> AttentionArgs:
    q, k = torch.zeros(2, 4, 4, d, dtype=dtype), torch.zeros(2, 6, 2, d, dtype=dtype)
    if page:
        k = torch.zeros(3, page, 2, d, dtype=dtype)
        options |= {"block_table": torch.zeros(2, 1, dtype=torch.int32), "cache_seqlens": 6}
    return build_args(q, k, k, **options)


def reasons(a: AttentionArgs) -> str:
    return "; ".join(ascend.attention_reasons(a.signature()))


def test_without_a_device_it_says_why():
    if not dispatch.unavailable("ascend"):
        pytest.skip("emulated, or an NPU is here")
    assert "torch_npu is not installed" in dispatch.unavailable("ascend")[0]


def test_910b_takes_what_either_way_can(on_chip):
    on_chip("910b")
    for a in (args(), args(softcap=5.0), args(torch.float32), args(d=512), args(alibi_slopes=torch.ones(4))):
        assert reasons(a) == ""
    both = reasons(args(torch.float32, softcap=5.0))
    assert "float16 and bfloat16" in both
    assert "fused_infer: softcap" in both
    assert "fusion: softcap" in both


def test_310p_takes_what_atb_can(on_chip):
    on_chip("310p")
    assert reasons(args(causal=True)) == ""
    assert reasons(args(causal=True, page=64, kv_layout="npu_nz")) == ""
    assert "no compiler for 310p" in reasons(args(causal=True, softcap=5.0))
    assert "pages on 310p are NZ" in reasons(args(causal=True, page=64))
    assert "causal" in reasons(args())


def test_910a_takes_pages_in_nz(on_chip):
    on_chip("910a")
    assert reasons(args(causal=True, page=64, kv_layout="npu_nz")) == ""
    assert "k: not in pages" in reasons(args(causal=True))
    norm = ascend_small.OPS["rms_norm"]
    assert norm.reasons(fastattn.spec.RmsNormArgs(torch.zeros(2, 8), torch.zeros(8), 1e-5).signature()) == []


@pytest.mark.parametrize("family", ["310p", "910a"])
def test_pages_are_in_nz_where_atb_reads_them(on_chip, family):
    """sdpa takes the rest, and reads no NZ."""
    on_chip(family)
    for d, size in ((64, 128), (80, 128), (128, 128), (192, 80), (256, 64)):
        for features in (frozenset(), frozenset({"window"})):
            assert ascend.BACKEND.pages(d, torch.float16, features) == (size, "npu_nz")
    for d, dtype in ((128, torch.bfloat16), (128, torch.float32), (72, torch.float16), (512, torch.float16)):
        assert ascend.BACKEND.pages(d, dtype, frozenset()) == (128, "nhd")
    for feature in ("softcap", "alibi_slopes", "sinks", "k_scale", "return_lse"):
        assert ascend.BACKEND.pages(128, torch.float16, frozenset({feature})) == (128, "nhd")


@pytest.mark.parametrize("feature", ["softcap", "alibi_slopes", "sinks"])
def test_what_atb_lacks_is_refused_before_the_call(on_chip, feature):
    """So that dispatch goes on to the next backend."""
    on_chip("310p")
    values = {"softcap": 5.0, "alibi_slopes": torch.ones(4), "sinks": torch.ones(4)}
    assert feature in reasons(args(causal=True, page=64, **{feature: values[feature]}))
    assert "window" in reasons(args(causal=True, window=(4, None)))


def test_pages_are_not_in_nz_without_the_operators(on_chip, monkeypatch):
    on_chip("310p")
    chip = chip_of("310p")
    for absent in ("_npu_reshape_and_cache", "_npu_paged_attention"):
        old = chip._replace(operators=chip.operators - {absent})
        monkeypatch.setattr(ascend.router, "current", lambda old=old: old)
        assert ascend.BACKEND.pages(128, torch.float16, frozenset()).layout == "nhd"


def test_small_ops_without_a_compiler_refuse_what_only_kernels_do(on_chip):
    on_chip("310p")
    x = torch.zeros(2, 8, dtype=torch.float16)
    why_not = ascend_small.OPS["swiglu"].reasons(fastattn.spec.SwigluArgs(x).signature())
    assert why_not == ["npu_swiglu does not exist on 310p", "no compiler for 310p"]


def test_without_triton_ascend_only_torch_npu_runs(on_chip, monkeypatch):
    """An environment as pyproject.toml's extra makes it: NVIDIA's Triton, or none."""
    absent = "triton-ascend is not installed"
    on_chip("910b")
    monkeypatch.setattr(launch, "has_triton_ascend", lambda: False)
    x, cos = torch.zeros(2, 3, 128, dtype=torch.float16), torch.zeros(9, 64)
    where, pages = torch.tensor([0, 1]), torch.zeros(2, 16, 3, 128, dtype=torch.float16)
    able = {
        "rotary": fastattn.spec.RotaryArgs(x, cos, cos, where),
        "append_kv": fastattn.spec.AppendKvArgs(pages, pages, x, x, where),
        "swiglu": fastattn.spec.SwigluArgs(x),
    }
    for name, call in able.items():
        assert ascend_small.OPS[name].reasons(call.signature()) == []
    assert isinstance(ascend_small.append_choice(able["append_kv"], chip_of("910b")), Invocation)
    w = make("int4", 8, 128)
    linear = fastattn.spec.LinearArgs(torch.zeros(1, 128, dtype=torch.float16), w)
    assert ascend_small.OPS["linear"].reasons(linear.signature()) == [absent]
    assert reasons(args()) == ""
    assert absent in reasons(args(softcap=5.0))


def test_triton_ascend_is_told_from_triton(monkeypatch, tmp_path):
    """Both install as `triton`; here is NVIDIA's."""
    look = launch.has_triton_ascend.__wrapped__
    assert not look()
    (tmp_path / "triton" / "backends" / "ascend").mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert look()


def test_what_torch_npu_cannot_do_there_is_left_to_other_backends(on_chip):
    """On 310P and 910A a reason of torch_npu's operator is a reason of the backend: dispatch goes on."""
    on_chip("310p")
    x, cos = torch.zeros(2, 3, 128, dtype=torch.float16), torch.zeros(9, 64)
    where = torch.tensor([0, 1])
    turn = fastattn.spec.RotaryArgs(x, cos, cos, where)
    norm = fastattn.spec.RmsNormArgs(x, x[0, 0], 1e-5)
    pages = torch.zeros(2, 16, 3, 128, dtype=torch.float16)
    append = fastattn.spec.AppendKvArgs(pages, pages, x, x, where, kv_layout="npu_nz")
    table = ascend_small.OPS
    for name, able in (("rotary", turn), ("rms_norm", norm), ("append_kv", append)):
        assert table[name].reasons(able.signature()) == []
    assert "interleaved" in table["rotary"].reasons(turn._replace(interleaved=True).signature())[0]
    assert "turns all" in table["rotary"].reasons(turn._replace(cos=cos[:, :8]).signature())[0]
    assert "weight" in table["rms_norm"].reasons(norm._replace(weight=norm.weight.float()).signature())[0]
    assert "kv_layout" in table["append_kv"].reasons(append._replace(kv_layout="nhd").signature())[0]
    on_chip("910a")
    assert table["append_kv"].reasons(append.signature()) == []
    assert "does not exist on 910a" in table["rms_norm"].reasons(norm._replace(residual=x).signature())[0]


def test_append_reads_no_slots_where_our_kernel_runs(on_chip, monkeypatch):
    """Slots on meta cannot be read, as those on a device cannot while a graph is captured."""
    x, pages = torch.zeros(2, 3, 128).half(), torch.zeros(2, 16, 3, 128).half()
    a = fastattn.spec.AppendKvArgs(pages, pages, x, x, torch.zeros(2, dtype=torch.int64, device="meta"))
    on_chip("910b")
    assert "our kernel" in ascend_small.append_choice(a, chip_of("910b"))
    monkeypatch.setattr(ascend_small, "settings", Settings.from_env({"FASTATTN_ASCEND": "torch_npu"}))
    choice = ascend_small.append_choice(a._replace(slots=torch.tensor([3, -1])), chip_of("910b"))
    assert choice.name == "npu_scatter_pa_kv_cache"
    assert choice.args[4].tolist() == [3]


def test_settings():
    assert Settings.from_env({"FASTATTN_ASCEND": "kernels"}).ascend == "kernels"
    with pytest.raises(ValueError, match="FASTATTN_ASCEND='both': expected auto, kernels or torch_npu"):
        Settings.from_env({"FASTATTN_ASCEND": "both"})


@pytest.mark.emulate("ascend")
@pytest.mark.toolchain
class TestEmulated:
    def test_it_comes_before_the_cpu(self):
        dispatch.calls.clear()
        q = torch.randn(1, 5, 2, 16, dtype=torch.float16)
        report = fastattn.check(fastattn.attention, q, q, q, causal=True, return_lse=True)
        assert report.ok, str(report)
        assert dict(dispatch.calls) == {("ascend", "attention"): 1}

    def test_what_it_cannot_do_has_the_reason(self):
        q = torch.randn(1, 5, 2, 16)
        with pytest.raises(
            UnsupportedError, match=r"ascend: dtype torch.float32, they take float16 and bfloat16"
        ):
            fastattn.attention(q, q, q, backend="ascend")

    def test_bad_indices_are_refused(self):
        q = torch.randn(1, 1, 2, 16, dtype=torch.float16)
        pages = torch.randn(2, 16, 2, 16, dtype=torch.float16)
        table = torch.tensor([[5]], dtype=torch.int32)
        with pytest.raises(ValueError, match="block_table"):
            fastattn.attention(q, pages, pages, block_table=table, cache_seqlens=4, backend="ascend")
