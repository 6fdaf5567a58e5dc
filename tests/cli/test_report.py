"""``fastattn report``: what it checks of every backend."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from fastattn import check_calls, cli, dispatch
from fastattn.check_calls import calls
from fastattn.cli import report as command
from fastattn.spec import RotaryArgs


def test_every_feature_of_every_op_is_asked_for():
    """Those that the oracle names, and NZ pages, which it does not read."""
    asked: dict[str, set[str]] = defaultdict(set)
    for call in calls(torch.device("cpu"), torch.float32):
        asked[call.op] |= call.args.features()
    for op in ("attention", "append_kv"):
        asked[op].remove("kv_layout")
    named = {op: kernel.features for op, kernel in dispatch.op_table("reference").items()}
    named["attention"] -= {"max_seqlen_q", "max_seqlen_k"}  # bounds, with every packed call
    assert asked == named


def test_a_backend_that_ran_nothing_is_not_right(monkeypatch, capsys):
    """As where every call is one that it refuses."""
    monkeypatch.setattr(dispatch, "use_backend", lambda _: nullcontext())
    monkeypatch.setattr(command, "check_every_op", lambda *_: True)
    assert cli.main(["report", "--backend", "sdpa", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "no op ran on sdpa" in printed
    assert "float16: WRONG" in printed


@pytest.mark.slow
def test_every_op_is_checked_on_the_named_backend(capsys):
    assert command.check_every_op("cpu", "cpu")
    printed = capsys.readouterr().out
    for op in dispatch.op_table("cpu"):
        assert f"{op} on cpu: " in printed
    assert "| embedding, 4 bits, permuted | float16 | refused: x_perm is not supported |" in printed
    assert "WRONG" not in printed


@pytest.mark.parametrize("backend", ["volta", "triton"])
def test_a_backend_that_takes_nothing_is_not_right(backend, capsys):
    if not dispatch.unavailable(backend):
        pytest.skip(f"{backend} runs here")
    assert not command.check_every_op(backend, "cpu")  # refused, and so nothing is computed
    assert "0 calls taken" in capsys.readouterr().out


def broken(a: RotaryArgs) -> Any:
    if a.interleaved:
        raise AssertionError
    raise RuntimeError("illegal address\nmore")


def test_a_wrong_kernel_shows(capsys, monkeypatch):
    table = dict(dispatch.op_table("sdpa"))
    table["swiglu"] = table["swiglu"]._replace(run=lambda a: a.x[:, : a.x.shape[1] // 2] + 1)
    table["rotary"] = table["rotary"]._replace(run=broken)
    few = lambda *of: (c for c in calls(*of) if c.op in ("swiglu", "rotary", "rms_norm"))  # noqa: E731
    monkeypatch.setattr(check_calls, "calls", few)
    monkeypatch.setattr(dispatch, "op_table", lambda name: table)
    monkeypatch.setattr(dispatch, "_resolved", {})
    assert not command.check_every_op("sdpa", "cpu")
    printed = capsys.readouterr().out
    assert "swiglu on sdpa: 1 compared, 1 WRONG" in printed
    assert "| rotary of halves | float16 | FAILED RuntimeError: illegal address |" in printed
    assert "| rotary of pairs | float16 | FAILED AssertionError:  |" in printed
    assert printed.endswith(" 9 wrong\n")  # of three dtypes: the gate, both rotations
