"""What needs no second process: environments, arguments, messages, the cost model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.collectives import exchange, prompts
from fastattn.collectives.exact import Exact
from fastattn.parallel import group
from fastattn.parallel.interface import interface_towards
from fastattn.parallel.linear import ColumnLinear
from fastattn.parallel.vocab import VocabParallelEmbedding
from fastattn.quant import packed
from fastattn.spec import Link, Point, Rates, TPGroup
from fastattn.threads import machine
from tests.parallel.ranks import HERE, ROOT

TWO = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
ALONE = group.single()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*TWO, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.usefixtures("clean")
def test_without_a_launcher_there_is_one_rank() -> None:
    g = group.init(7, split=(3,))
    assert g == TPGroup(None, 0, 1, 7, (1.0,))
    assert group.shutdown(g)
    assert group.init().timeout_s == ALONE.timeout_s == 60


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"RANK": ""}, {}, r"variable RANK='': expected an integer >= 0"),
        ({"RANK": "2"}, {}, r"variable RANK=2: expected less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, {}, r"variable WORLD_SIZE='two': expected an integer >= 1"),
        ({"WORLD_SIZE": "0"}, {}, r"variable WORLD_SIZE='0'"),
        ({"MASTER_ADDR": ""}, {}, r"variable MASTER_ADDR is not set, WORLD_SIZE=2 ranks need it"),
        ({}, {"split": (1, 2, 3)}, r"split: 3 shares \(1, 2, 3\) for 2 ranks"),
        ({}, {"split": (1, 0)}, r"split: \(1, 0\), expected positive numbers"),
        ({}, {"timeout_s": 0}, r"timeout_s: 0, expected seconds > 0"),
        ({}, {"device": "meta"}, r"device: meta, tensor parallelism runs on cpu, cuda, npu"),
        ({}, {"device": "abacus"}, r"device: 'abacus', expected one that torch sees: "),
    ],
    ids=[
        "no rank",
        "rank",
        "world",
        "no world",
        "master",
        "split length",
        "split zero",
        "timeout",
        "device",
        "no device",
    ],
)
def test_wrong_environments_and_arguments(
    clean: pytest.MonkeyPatch, change: dict[str, str], arguments: dict[str, object], message: str
) -> None:
    for name, value in {**TWO, **change}.items():
        clean.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        group.init(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environment", "asked", "threads"),
    [
        ({}, None, "all"),
        ({"OMP_NUM_THREADS": "1"}, None, "OMP_NUM_THREADS=1"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, None, "all"),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, None, "OMP_NUM_THREADS=2"),
        ({"OMP_NUM_THREADS": "1"}, 2, "asked for"),
    ],
    ids=["default", "user", "torchrun", "user under torchrun", "argument"],
)
def test_threads(
    clean: pytest.MonkeyPatch, environment: dict[str, str], asked: int | None, threads: str
) -> None:
    for name, value in environment.items():
        clean.setenv(name, value)
    before = torch.get_num_threads()
    try:
        chosen = group.set_threads(ALONE, asked)
        expected = group.Threads(machine().threads, f"{machine()} for 1 rank here")
        if threads != "all":
            expected = group.Threads(asked or before, threads)
        assert chosen == expected
        assert torch.get_num_threads() == expected.num
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ValueError, match="threads: 0, expected at least 1"):
        group.set_threads(ALONE, 0)


def test_under_torchrun(tmp_path: Path) -> None:
    """The launcher that the documentation names, with its own rendezvous."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "loop.py"), "all_reduce", "20", "0.1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout.count("ready"), done.stdout.count("done")) == (2, 2)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "[/x/gloo/pair.cc:553] Connection closed by peer [10.0.0.2]:77. This is typically caused by a",
            "another rank ended (Connection closed by peer [10.0.0.2]:77)",
        ),
        (
            "[/x/unbound_buffer.cc:78] Timed out waiting 5000ms",
            "no answer within 5 s: another rank is stopped or the link is cut (Timed out waiting 5000ms)",
        ),
        ("Invalid scalar type\nmore", "Invalid scalar type"),
    ],
    ids=["dead", "silent", "other"],
)
def test_reasons_are_readable(message: str, reason: str) -> None:
    assert exchange.reason_of(RuntimeError(message), 5.0) == reason


def test_interface_towards() -> None:
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("name.invalid") is None


def test_exact_cost_and_limits() -> None:
    policy = Exact(item_bytes=2)
    assert policy.wire_bytes(10, 576, 1) == 0
    assert policy.wire_bytes(10, 576, 3) == 4 * 1920 * 2
    assert policy.wire_bytes(1, 7, 2) == 2 * 4 * 2  # an odd number of values: the longer half counts
    link = Link(0.001, 1e6)
    assert policy.seconds(10, 576, link, Rates(item_bytes=2, world=3)) == pytest.approx(
        4 * (0.001 + 1920 * 2 / 1e6)
    )
    assert policy.seconds(10, 576, link, Rates(item_bytes=2)) == 0
    assert (policy.name, policy.exact, policy.scatters, policy.needs_full_residual) == (
        "exact",
        True,
        False,
        True,
    )
    point, two = Point(0, "mlp", "prefill"), ALONE._replace(world=2)
    assert policy.reasons(point, 1, 576, torch.bfloat16, two) == []
    assert "float8_e4m3fn cannot be summed" in policy.reasons(point, 1, 576, torch.float8_e4m3fn, two)[0]


def test_wrong_weights_are_refused_before_anybody_waits() -> None:
    two = ALONE._replace(world=2, rank=1)
    weight = packed.dense(torch.zeros(5, 4))
    with pytest.raises(ValueError, match="weight: 5 rows, expected 4"):
        VocabParallelEmbedding(weight, [(0, 5), (5, 9)], two)
    with pytest.raises(ValueError, match=r"spans: .*expected 2 that follow each other from 0"):
        VocabParallelEmbedding(weight, [(0, 4), (5, 10)], two)
    with pytest.raises(ValueError, match=r"weights: inputs of \[3, 4\] columns"):
        ColumnLinear(weight, packed.dense(torch.zeros(5, 3)))
    with pytest.raises(ValueError, match="weights: none"):
        ColumnLinear()
    with pytest.raises(ValueError, match=r"sizes: \(5, 6\), expected 2 with 5 for rank 1"):
        exchange.gather_last(two, torch.zeros(1, 5), (5, 6), "logits")
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        exchange.all_reduce(two, torch.zeros(3, 4).T, "test")
    with pytest.raises(ValueError, match="prompts: given on rank 1"):
        prompts.broadcast_prompts(two, [[1]])
    with pytest.raises(ValueError, match=r"tokens: torch.int32 \(2,\), expected int64 \(2,\) on rank 0"):
        prompts.broadcast_tokens(ALONE, torch.zeros(2, dtype=torch.int32), 2)
