"""`fastattn.check`: right calls pass on every backend, each wrong answer is found and named."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import dispatch, ops, reference_mx
from fastattn.quant import packed
from fastattn.spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, Op
from tests.api.cases import LAYOUTS, random_case
from tests.ops.test_rotary_append import angles
from tests.ops.weights import make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
def test_attention_of_every_layout(backend, layout):
    """Everything an attention call can ask for, read through every indirection."""
    compared = 0
    for seed in range(6):
        case = random_case(seed, layout, torch.float32, 24)
        if dispatch.explain("attention", case.args().signature())[backend]:
            continue
        report = fastattn.check(fastattn.attention, case.q, case.k, case.v, backend=backend, **case.options)
        assert all(f.ok for f in report.findings), f"{case}\n{report}"
        compared += len(report.findings)
    assert compared or backend == "sdpa"


def call_of_each_op() -> dict[str, object]:
    """A call of each op that `check` compares."""
    x = torch.randn(9, 64)
    cos, sin = angles(16)
    cache = torch.zeros(2, 3, 4, 2, 16)
    heads = torch.randn(9, 2, 16)
    slots, positions = torch.tensor([0, -1, 3, 3, 7, 2, 11, 9, 8]), torch.arange(9)
    w = make("int4", 40, 64, bias=torch.float32)
    codes = reference_mx.mx_pack(MxPackArgs(x, "e2m1", 32))
    message = reference_mx.encode(EncodeArgs(x, "e2m1", 32))
    q, kv = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 16)
    return {
        "attention": lambda: fastattn.attention(q, kv, kv, causal=True, return_lse=True),
        "rms_norm": lambda: ops.rms_norm(x, torch.ones(64), 1e-5, residual=x),
        "swiglu": lambda: ops.swiglu(x),
        "rotary": lambda: ops.rotary(heads, cos, sin, positions),
        "append_kv": lambda: ops.append_kv(
            *cache, heads, heads, slots, cos=cos, sin=sin, positions=positions
        ),
        "linear": lambda: ops.linear(x, w),
        "embedding": lambda: ops.embedding(torch.tensor([3, 1, 3]), w, torch.float32),
        "mx_pack": lambda: dispatch.run("mx_pack", MxPackArgs(x, "e2m1", 32)),
        "mx_unpack": lambda: dispatch.run("mx_unpack", MxUnpackArgs(*codes, "e2m1", 32, 64, torch.float32)),
        "encode": lambda: dispatch.run("encode", EncodeArgs(x, "e2m1", 32)),
        "decode_sum": lambda: dispatch.run(
            "decode_sum", DecodeSumArgs((message, message), 9, 64, torch.float32, "e2m1", 32)
        ),
    }


@pytest.mark.parametrize("op", sorted(call_of_each_op()))
def test_right_and_wrong_answers(op, monkeypatch):
    call = call_of_each_op()[op]
    report = fastattn.check(call)
    assert report.ok, str(report)
    assert {(f.op, f.backend) for f in report.findings} == {(op, "cpu")}

    table = dict(dispatch.op_table("cpu"))
    right = table[op]

    def wrong(args):
        """Some elements off by a hundredth: what a fused operator's bug looks like in the mildest case."""
        result = right.run(args)
        spoiled = args.k_cache if op == "append_kv" else result[0] if isinstance(result, tuple) else result
        spoiled.view(-1)[:: max(1, spoiled.numel() // 40)] += 0.01 if spoiled.is_floating_point() else 1
        return result

    table[op] = Op(wrong, right.features, right.reasons)
    monkeypatch.setattr(dispatch, "op_table", lambda name: table)
    monkeypatch.setattr(dispatch, "_resolved", {})
    report = fastattn.check(call)
    assert not report.ok
    assert "WRONG" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["int4", "int8 cut at 5"])
def test_activations_in_8_bits_are_right(kind, dtype):
    """The caller asked for their rounding: that much is allowed, and no more."""
    w = make(kind, 40, 96)
    x = torch.randn(1, w.shape[1], dtype=dtype)
    report = fastattn.check(ops.linear, x, w, act="int8")
    assert report.ok, str(report)
    exact = fastattn.check(ops.linear, x, w)
    assert exact.findings[0].limit < report.findings[0].limit < 0.1 * float(exact.result.abs().max())


def test_nan_is_right_where_the_oracle_has_it():
    q, kv = torch.randn(1, 5, 2, 16), torch.randn(1, 7, 2, 16)
    q[0, 2, 1, 3] = torch.nan
    report = fastattn.check(fastattn.attention, q, kv, kv, causal=True)
    assert report.result.isnan().sum() == 16
    assert report.ok, str(report)


def test_nan_is_wrong(monkeypatch):
    right = dispatch.op_table("cpu")["attention"]
    table = {"attention": right._replace(run=lambda a: (right.run(a)[0] * torch.nan, right.run(a)[1]))}
    monkeypatch.setattr(dispatch, "op_table", lambda name: table)
    monkeypatch.setattr(dispatch, "_resolved", {})
    assert not fastattn.check(call_of_each_op()["attention"]).ok


def test_a_uniform_average_is_wrong():
    """vllm-ascend #13699: plausible numbers, no mask and no scores."""
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    report = fastattn.check(fastattn.attention, q, k, v)
    exact = report.result
    average = v.mean(1, keepdim=True).expand_as(exact)
    assert float((average - exact).abs().max()) > 100 * report.findings[0].limit


def test_calls_with_nothing_to_compare_are_named():
    """Here rows that are all skipped; on 310P also pages in NZ, which the oracle does not read."""
    heads, pages, skipped = torch.randn(1, 2, 16), torch.zeros(1, 4, 2, 16), torch.tensor([-1])
    report = fastattn.check(ops.append_kv, pages, pages, heads, heads, skipped)
    assert str(report) == "append_kv on cpu: 1 not compared"
    assert not report.ok


def test_nothing_ran():
    report = fastattn.check(sum, [1, 2])
    assert report.result == 3
    assert (report.ok, str(report)) == (False, "no op ran")


def test_results_are_the_calls_own():
    x = torch.randn(3, 64)
    w = packed.dense(torch.randn(5, 64))
    assert torch.equal(fastattn.check(ops.linear, x, w).result, ops.linear(x, w))
