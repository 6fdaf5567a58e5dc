"""The benchmark programs: arguments, timing, records, prompts, and a short real run of each."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import llm as bench_llm
import perplexity as bench_perplexity
import quant as bench_quant
from lib import args, attention_cases, env, limits, memory, plot, quant_cases, records, table, text, timing

from .markdown import ROOT

FIELDS = {
    "bench", "case", "metric", "unit", "ours", "peer", "peer_value", "ratio", "limit", "limit_value",
    "spread", "claim", "env",
}  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), [("4", (4,)), ("1,4,16", (1, 4, 16))])
def test_sweep(given: str, expected: tuple[int, ...]) -> None:
    assert args.sweep(given) == expected


@pytest.mark.parametrize("given", ["", "0", "1,,2", "-3", "two", "1.5"])
def test_sweep_refuses(given: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        args.sweep(given)


def test_names_refuses_and_lists_what_is_accepted() -> None:
    parse = args.names(("fp32", "bf16"))
    assert parse("bf16,fp32") == ("bf16", "fp32")
    with pytest.raises(argparse.ArgumentTypeError, match="'int8', expected fp32, bf16"):
        parse("fp32,int8")


def test_llm_arguments() -> None:
    line = "--batch_size 1,8 --input_len 64 --output_len 16,32 --tensor_para_size 1,2,3"
    more = "--inference_data_type bf16 --peer transformers,llama.cpp"
    a = bench_llm.parser().parse_args(f"{line} {more}".split())
    assert (a.batch_size, a.input_len, a.output_len) == ((1, 8), (64,), (16, 32))
    assert a.tensor_para_size == (1, 2, 3)
    assert (a.inference_data_type, a.peer, a.model) == (("bf16",), ("transformers", "llama.cpp"), "smollm2")
    assert bench_llm.parser().parse_args(["--act", "none,int8"]).act == ("none", "int8")


@pytest.mark.parametrize(
    "line",
    ["--batch_size 0", "--inference_data_type int4", "--act fp8", "--peer vllm", "--iterations 0"],
)
def test_llm_refuses(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_llm.parser().parse_args(line.split())
    assert "expected" in capsys.readouterr().err


def test_interleave_rotates_and_drops_the_warmup() -> None:
    order: list[str] = []

    def run(name: str, value: int):  # type: ignore[no-untyped-def]
        def call() -> int:
            order.append(name)
            return value + len(order)

        return call

    results = timing.interleave({"a": run("a", 0), "b": run("b", 100)}, iterations=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": [4, 5], "b": [103, 106]}


def test_summary() -> None:
    assert timing.summarize([2.0, 4.0, 3.0]) == (3.0, 2 / 3)
    with pytest.raises(ValueError, match="none"):
        timing.summarize([])


def test_ratio_above_one_means_ours_is_better() -> None:
    assert records.ratio(10.0, 20.0, higher_is_better=False) == 2
    assert records.ratio(10.0, 20.0, higher_is_better=True) == 0.5
    assert records.ratio(10.0, None, higher_is_better=True) is None


def test_a_sweep_is_recorded_in_parts(tmp_path: Path) -> None:
    """A case measured again takes the place of its record; others stay."""
    file = tmp_path / "records.json"
    shared = {"bench": "b", "spread": 0.0, "claim": "measured", "env": {}}
    first, second = ({**shared, "case": case} for case in ("first", "second"))
    records.append(file, [records.Record.of(first, "time", "ms", 1.0)])
    records.append(file, [records.Record.of(second, "time", "ms", 2.0)])
    found = records.append(file, [records.Record.of(first, "time", "ms", 3.0)])
    assert [(r.case, r.ours) for r in found] == [("second", 2.0), ("first", 3.0)]
    assert [records.Record(**r) for r in json.loads(file.read_text())] == found


def test_record_refuses_another_claim() -> None:
    shared = {"bench": "b", "case": "c", "spread": 0.0, "claim": "assumed", "env": {}}
    with pytest.raises(ValueError, match="'assumed', expected measured, compiled, emulated, modelled"):
        records.Record.of(shared, "latency", "ms", 1.0)


def test_prompts_differ_and_have_the_length_asked_for() -> None:
    made = text.prompts(list(range(100)), batch=4, length=250)
    assert [len(p) for p in made] == [250] * 4
    assert len({tuple(p) for p in made}) == 4
    assert all(b == (a + 1) % 100 for p in made for a, b in pairwise(p))


def test_table_shows_missing_values() -> None:
    t = table.Table([table.Column("n", 3, "d"), table.Column("ms", 6, ".1f")])
    assert t.header().splitlines() == ["  n      ms", "-----------"]
    assert t.row(12, None) == " 12       -"


def test_peak_memory_sees_a_large_tensor() -> None:
    import torch

    memory.reset_peak()
    before = memory.peak_bytes()
    torch.ones(64 << 20, dtype=torch.uint8)  # freed at once, and still the peak
    assert memory.peak_bytes() - before > 48 << 20


def test_limits_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "last_level_cache", lambda: 1 << 20)
    assert 1e8 < limits.read_bandwidth(rounds=1) < 1e13
    assert env.last_level_cache() >= 1 << 18


@pytest.mark.parametrize("extra", [{}, {"page": 16}, {"packed": True}, {"kind": "prefill"}], ids=str)
def test_attention_rivals_compute_the_same(extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(attention_cases, "last_level_cache", lambda: 1 << 10)
    shape = {"kind": "decode", "dtype": "fp32", "keys": 48, "batch": 3, "heads": 6, "kv_heads": 2}
    case = attention_cases.Case(**{**shape, "head_dim": 24, **extra})
    q, k, v = attention_cases.operands(case)[0]
    named = attention_cases.rivals(case)
    assert len(named) > 1
    with torch.inference_mode():
        expected = named.pop("fastattn")(q, k, v)
        for rival in named.values():
            torch.testing.assert_close(rival(q, k, v), expected)


def test_attention_work_counts_visible_pairs() -> None:
    case = attention_cases.Case("prefill", "bf16", 7, heads=2, kv_heads=1, head_dim=8)
    assert case.flop() == 4 * 2 * 8 * sum(range(1, 8))
    # A window of 3 keys before its own: 1, 2, 3, 4, 4, 4, 4.
    assert replace(case, window=3).flop() == 4 * 2 * 8 * (6 + 4 * 4)
    decode = replace(case, kind="decode", batch=4, packed=True, keys=8)
    assert decode.lengths() == [2, 4, 6, 8]
    assert (decode.flop(), decode.kv_bytes()) == (4 * 2 * 8 * 20, 2 * 20 * 8 * 2)


@pytest.mark.parametrize("fmt", quant_cases.FORMATS)
def test_quant_rivals_compute_the_same(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(quant_cases, "last_level_cache", lambda: 1 << 12)
    operands = quant_cases.Operands.of(quant_cases.Layer(fmt, 64, 256, "bf16"))
    assert len(operands.weights) * quant_cases.nbytes(operands.weights[0]) >= 8 << 12
    named, x = operands.rivals("none"), torch.randn(5, 256).bfloat16()
    assert ("torch int4" in named) == (quant_cases.torch_has_int4() and fmt.startswith("int4"))
    with torch.inference_mode():
        expected = named["torch bf16"](x)
        for rival in named.values():
            torch.testing.assert_close(rival(x), expected, atol=0.03, rtol=0.03)


def test_quant_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--format int8-32 --shape 64x128,96x256 --rows 1,3 --act none,int8"
    a = bench_quant.parser().parse_args(line.split())
    assert (a.format, a.shape, a.rows, a.act) == (
        ("int8-32",),
        ((64, 128), (96, 256)),
        (1, 3),
        ("none", "int8"),
    )
    for bad in ("--format int3-32", "--shape 64", "--shape 64x100", "--rows 0"):
        with pytest.raises(SystemExit):
            bench_quant.parser().parse_args(bad.split())
        assert "expected" in capsys.readouterr().err


def test_curves_leave_out_what_is_common() -> None:
    shared = {"bench": "llm", "spread": 0.0, "claim": "measured", "env": {}}
    made = [
        records.Record.of(
            {**shared, "case": f"smollm2 fp32 batch={b} tp={tp}"}, "throughput", "tokens/s", 10.0 * b,
            ("rival", 5.0 * b, 2.0), ("memory", 40.0 * b),
        )
        for b in (1, 4) for tp in (1, 2)
    ]  # fmt: skip
    assert plot.varied(made, ("input", "batch")) == "batch"
    curves = plot.by(made, "throughput", "batch")
    assert curves["fastattn tp=2"] == {1: 10.0, 4: 40.0}
    assert curves["rival tp=1"] == {1: 5.0, 4: 20.0}
    assert curves["limit: memory tp=1"] == {1: 40.0, 4: 160.0}


def test_perplexity_is_that_of_cross_entropy() -> None:
    import torch
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    logits, other, targets = torch.randn(40, 7), torch.randn(40, 7), torch.randint(0, 7, (40,))
    score = bench_perplexity.Score("fp32", "none")
    for part in (slice(0, 11), slice(11, 40)):
        score.add(logits[part].log_softmax(-1), other[part].log_softmax(-1), targets[part])
    losses = cross_entropy(logits.double(), targets, reduction="none")
    assert score.perplexity.value == pytest.approx(float(losses.mean().exp()), rel=1e-5)
    error = float(losses.mean().exp() * losses.std(unbiased=False) / 40**0.5)
    assert score.perplexity.error == pytest.approx(error, rel=1e-4)
    p, q = other.double().softmax(-1), logits.double().softmax(-1)
    assert score.kl / score.tokens == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)
    assert score.same_top == int((logits.argmax(-1) == other.argmax(-1)).sum())


def run_program(program: str, *line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / program), *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def test_attention_program(tmp_path: Path) -> None:
    out = tmp_path / "attention.json"
    line = "--shorten 64 --data_type fp32 --seconds 0.01"
    files = ("--json", str(out), "--plot", str(tmp_path / "attention.png"))
    run_program("attention.py", *line.split(), *files)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(out.read_text())
    assert {r["peer"] for r in written} == {"sdpa enable_gqa", "sdpa folded"}
    assert all(0 < r["ours"] < 3 * r["limit_value"] for r in written)
    assert all(set(r) == FIELDS and r["ours"] > 0 and r["claim"] == "measured" for r in written)


def test_quant_program(tmp_path: Path) -> None:
    out = tmp_path / "quant.json"
    line = "--format int4-128,int8-32 --shape 512x1024 --rows 1,20 --data_type bf16 --seconds 0.01"
    run_program("quant.py", *line.split(), "--json", str(out), "--plot", str(tmp_path / "quant.png"))
    assert (tmp_path / "quant.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads(out.read_text())
    assert all(set(r) == FIELDS and r["ours"] > 0 and r["limit_value"] > 0 for r in written)
    assert {(r["case"].split()[0], r["peer"]) for r in written} >= {
        ("int4-128", "torch bf16"),
        ("int8-32", "torch bf16"),
    }


@pytest.mark.slow
def test_perplexity_program(tmp_path: Path) -> None:
    out = tmp_path / "perplexity.json"
    run_program("perplexity.py", "--context=48", "--chunks=2", "--act=none", "--json", str(out))
    written = json.loads(out.read_text())
    assert all(set(r) == FIELDS for r in written)
    values = {(r["case"].split()[1], r["metric"]): r["ours"] for r in written}
    assert values["fp32", "same top token"] == 100
    assert values["fp32", "KL divergence"] == 0
    assert 1e-6 < values["bf16", "KL divergence"] < 0.05
    # Far from the vocabulary's 49152 of a model that knows nothing.
    assert 3 < values["fp32", "perplexity"] < 300


@pytest.mark.slow
def test_llm_program_on_two_ranks(tmp_path: Path) -> None:
    """Real weights on 1 and 2 ranks, against transformers on the same file: the greedy tokens are equal."""
    out = tmp_path / "llm.json"
    line = "--batch_size 2 --input_len 12 --output_len 6 --iterations 1 --threads 1 --peer transformers"
    done = run_program("llm.py", *line.split(), "--json", str(out), "--chat", "Say hello.")
    assert "12 of 12 greedy tokens equal ours" in done.stdout
    *_, answer = done.stdout.strip().split("> Say hello.\n")
    assert len(answer) > 3
    written = json.loads(out.read_text())
    assert all(set(r) == FIELDS for r in written)
    by_case = {(r["case"], r["metric"]): r for r in written}
    for world in (1, 2):
        case = f"smollm2 fp32 act=none batch=2 input=12 output=6 tp={world}"
        assert by_case[case, "latency"]["ratio"] > 0
        assert by_case[case, "TPOT"]["limit_value"] > 0
        assert by_case[case, "TTFT"]["limit_value"] > 0
        assert (case, f"peak memory of rank {world - 1}") in by_case
        assert (case, f"peak memory of rank {world}") not in by_case
        above = by_case[case, f"memory above torch of rank {world - 1}"]
        assert 0.5 * above["limit_value"] < above["ours"] < by_case[case, "peak memory of rank 0"]["ours"]
