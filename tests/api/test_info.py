"""`fastattn info`: one row a backend, and the reasons for one call from its shapes alone."""

from __future__ import annotations

import argparse
import re

import pytest
import torch

from fastattn import dispatch
from fastattn.attention import build_args
from fastattn.cli import info, why
from fastattn.settings import Settings

from .cases import int32


def test_rows_are_the_backends() -> None:
    rows = info.rows()
    assert [row.name for row in rows] == list(dispatch.BACKENDS)
    for row in rows:
        assert row.usable == (not row.reasons)
        assert row.usable or not row.details
    assert next(row for row in rows if row.name == "sdpa").details == {"torch": torch.__version__}


def test_report() -> None:
    lines = info.report().splitlines()
    assert lines[0].startswith("fastattn ")
    for name in dispatch.BACKENDS:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        for reason in dispatch.unavailable(name):
            assert reason in line
    for variable, _, _ in Settings.describe():
        assert sum(line.startswith(f"  {variable} ") for line in lines) == 1
    assert any(line.startswith("threads ") and f" {torch.get_num_threads()} " in line for line in lines)
    backends = [line for line in lines if line.startswith("  ") and line.split()[0] in dispatch.BACKENDS]
    assert len({len(line) - len(line[2:].split(maxsplit=1)[1]) for line in backends}) == 1, "not aligned"


def test_report_says_what_the_environment_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_TIMEOUT", "17")
    (line,) = [line for line in info.report().splitlines() if "FASTATTN_TIMEOUT" in line]
    assert "'17'" in line


def test_one_openmp_runtime() -> None:
    assert len(info.openmp_runtimes()) == 1


PAGES = torch.empty(9, 16, 8, 64, dtype=torch.bfloat16)
CALLS = {
    "q=1x1x32x128,k=1x4096x8x128,dtype=float16,device=cpu,causal": lambda: build_args(
        torch.empty(1, 1, 32, 128).half(), *[torch.empty(1, 4096, 8, 128).half()] * 2, causal=True
    ),
    "q=5x16x64, k=9x16x8x64, dtype=bfloat16, cu_seqlens_q=2, block_table=2x3, cache_seqlens, window=7:0,"
    "sinks, return_lse, softcap=30": lambda: build_args(
        torch.empty(5, 16, 64).bfloat16(), PAGES, PAGES, cu_seqlens_q=int32([0, 2, 5]), sinks=torch.empty(16),
        block_table=int32([[0, 1, 2]] * 2), cache_seqlens=3, window=(7, 0), return_lse=True, softcap=30.0,
    ),
    "q=2x3x4x8,k=2x5x2x8,v=2x5x2x16,attn_mask=bool,alibi_slopes,window=:-1,k_pos0": lambda: build_args(
        torch.empty(2, 3, 4, 8), torch.empty(2, 5, 2, 8), torch.empty(2, 5, 2, 16),
        attn_mask=torch.ones(3, 5).bool(), alibi_slopes=torch.empty(4), k_pos0=int32([0, 0]),
    ),
    "q=7x4x8,k=9x2x8,cu_seqlens_q=3,cu_seqlens_k=3": lambda: build_args(
        torch.empty(7, 4, 8), torch.empty(9, 2, 8), torch.empty(9, 2, 8),
        cu_seqlens_q=int32([0, 1, 2, 7]), cu_seqlens_k=int32([0, 1, 2, 9]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("spec", CALLS)
def test_signature_is_the_one_of_the_call(spec: str) -> None:
    assert why.signature_of(spec) == CALLS[spec]().signature()


def test_why_gives_each_backends_reasons() -> None:
    spec = "q=1x1x4x8,k=1x9x2x8,sinks,return_lse"
    lines = why.why(spec).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(dispatch.BACKENDS)
    for line, name in zip(lines[1:], dispatch.BACKENDS, strict=True):
        for reason in dispatch.reasons_against(name, "attention", why.signature_of(spec)):
            assert reason in line
    chosen = [line.split()[0] for line in lines if "would be chosen" in line]
    able = [
        n for n in dispatch.AUTOMATIC if not dispatch.reasons_against(n, "attention", why.signature_of(spec))
    ]
    assert chosen == able[:1]


def test_why_allocates_nothing() -> None:
    """Terabytes of keys."""
    text = why.why("q=1x1x64x128,k=1000000x1000000x8x128,cache_batch_idx,dtype=bfloat16")
    assert "sdpa       can run it" in text


def test_why_of_a_device_that_is_absent() -> None:
    text = why.why("q=1x1x4x8,k=1x9x2x8,device=npu")
    assert "tensors are on 'npu', it runs on cpu" in text
    assert "torch_npu is not installed" in text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("q=1x1x4x8", "k=BATCHxSEQLENxHEADSxHEAD_DIM is missing"),
        ("q=1x1x4x8,k=1x9x2x8,fast", "'fast', expected one of q, k,"),
        ("q=1x1x4x8,k=1x9x2x8,causal=1", "'causal=1', expected causal"),
        ("q=1x1x4x8,k=1x9x2x8,window", "'window', expected window="),
        ("q=1x1x4x8,k=1x9x2x8,window=3", "window=3, expected LEFT:RIGHT"),
        ("q=1x1x4x8,k=ax9x2x8", "k=ax9x2x8, expected sizes"),
        ("q=1x1x4x8,k=1x9x3x8", "k: 3 heads, expected a divisor of q's 4"),
        ("q=1x1x4x8,k=1x9x2x8,dtype=float17", "dtype=float17"),
        ("q=1x1x4x8,k=1x9x2x8,device=tpu", "device=tpu, expected one of"),
        ("q=1x1x4x8,k=1x9x2x8,softcap=big", "softcap=big, expected a number"),
        ("q=99999999999999999999x1x1x1,k=1x1x1x1", "q of 99999999999999999999x1x1x1, more than memory can"),
        ("q=1x1x4x8,k=1x9999999999x9999999999x2", "k of 1x9999999999x9999999999x2, more than memory can"),
        ("q=1x1x4x8,k=0x99999999999999999999x2x8", "k of 0x99999999999999999999x2x8, more than memory"),
        (f"q=1x{2**35}x1x8,k=1x{2**35}x1x8,attn_mask=bool", "attn_mask of 1x1x34359738368x34359738368, more"),
        (
            "q=1x1x4x8,k=1x9x2x8,block_table=9999999999x9999999999",
            "block_table of 9999999999x9999999999, more",
        ),
        ("q=6x4x8,k=6x2x8,cu_seqlens_q=²", "cu_seqlens_q=², expected the number of sequences"),
        ("q=6x4x8,k=6x2x8,cu_seqlens_k=²", "cu_seqlens_k=², expected the number of sequences"),
    ],
)
def test_bad_spec(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^--why: .*{re.escape(message)}|^{re.escape(message)}"):
        why.why(spec)


def test_main(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    info.add_arguments(parser)
    assert info.main(parser.parse_args([])) == 0
    assert capsys.readouterr().out.startswith("fastattn ")
    assert info.main(parser.parse_args(["--why", "q=1x1x4x8,k=1x9x2x8"])) == 0
    assert "can run it" in capsys.readouterr().out
