"""The choice among variants: the table's first, or what this machine timed and remembers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cuda_volta import prefill, tune
from cuda_volta.attention_params import AttentionCall
from cuda_volta.variant import Variant
from fastattn import reference
from fastattn.attention import build_args

from .kernels import axpy

DEVICE = torch.device("cuda", 1)


class Machine:
    """A Volta on which a launch takes as long as the test says."""

    def __init__(self, patch: pytest.MonkeyPatch, candidates: list[Variant]) -> None:
        self.candidates, self.launched = candidates, 0
        self.times = dict.fromkeys(candidates, 1.0)
        self.capturing, self.capability, self.name = False, (7, 0), "Tesla V100"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device: self.name)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(torch.cuda, "device", self._as_current)
        self.current: torch.device | None = None
        patch.setattr(tune, "_milliseconds", self._milliseconds)
        self.restart()

    def restart(self) -> None:
        """As a new process, which knows only what is on disk."""
        tune._chosen.clear()  # noqa: SLF001

    @contextmanager
    def _as_current(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device
        yield
        self.current = before

    def _milliseconds(self, launch: object, variant: Variant) -> float:
        assert self.current == DEVICE  # events are of the current device
        self.launch(variant)
        return self.times[variant]

    def launch(self, variant: Variant) -> None:
        self.launched += 1

    def best(self, kind: str = "prefill") -> int:
        return self.candidates.index(tune.best(kind, self.candidates, self.launch, DEVICE))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    base = axpy(tmp_path)
    candidates = [base._replace(defines=(("THREADS", n),)) for n in (128, 256, 512)]
    return Machine(monkeypatch, candidates)


def test_the_fastest_is_chosen_once_and_remembered(machine: Machine) -> None:
    machine.times[machine.candidates[2]] = 0.5
    assert machine.best() == 2
    launches = machine.launched
    assert launches == 3 * (1 + tune.ROUNDS)
    assert machine.best() == 2
    machine.restart()
    machine.times[machine.candidates[1]] = 0.1
    assert machine.best() == 2
    assert machine.launched == launches


def test_another_kind_machine_or_source_is_timed_anew(machine: Machine, tmp_path: Path) -> None:
    assert machine.best() == 0
    machine.times[machine.candidates[1]] = 0.1
    assert machine.best("decode") == 1
    machine.restart()
    machine.name = "Tesla V100-SXM3"
    assert machine.best() == 1
    machine.restart()
    machine.times = {v._replace(shared_bytes=1024): t for v, t in machine.times.items()}
    machine.candidates = list(machine.times)
    assert machine.best() == 1


@pytest.mark.parametrize("reason", ["capturing", "newer"])
def test_nothing_is_timed_during_a_capture_or_on_newer_gpus(machine: Machine, reason: str) -> None:
    machine.times[machine.candidates[1]] = 0.1
    machine.capturing, machine.capability = reason == "capturing", (9, 0) if reason == "newer" else (7, 0)
    assert machine.best() == 0
    assert machine.launched == 0
    machine.capturing, machine.capability = False, (7, 0)
    assert machine.best() == 1  # the first time that it can
    machine.capturing = True
    assert machine.best() == 1  # what is known needs no timing


def test_one_candidate_and_the_emulator_need_no_timing(machine: Machine) -> None:
    only = machine.candidates[:1]
    assert tune.best("prefill", only, machine.launch, DEVICE) is only[0]
    assert tune.best("prefill", machine.candidates, machine.launch, torch.device("cpu")) == only[0]
    assert machine.launched == 0


def test_a_damaged_memory_is_timed_again(machine: Machine, tmp_path: Path) -> None:
    machine.times[machine.candidates[1]] = 0.1
    assert machine.best() == 1
    (entry,) = (f for f in (tmp_path / "fastattn" / "volta-tuned").iterdir() if "lock" not in f.name)
    entry.write_bytes(b"7" + entry.read_bytes()[1:])
    machine.restart()
    machine.times[machine.candidates[1]] = 2.0
    assert machine.best() == 0


@pytest.mark.toolchain
@pytest.mark.parametrize("head_dim", [32, 128])
def test_every_candidate_computes_the_same_call(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, n, h, head_dim).half() for n, h in ((40, 2), (70, 1), (70, 1)))
    args = build_args(q, k, v, causal=True)
    exact, _ = reference.attention(args)
    call = AttentionCall(**{name: getattr(args, name) for name in AttentionCall._fields})
    tried = []
    for at in range(2):
        monkeypatch.setattr(
            prefill, "best", lambda kind, found, *rest, at=at: tried.append(found) or found[at]
        )
        out, _ = prefill.prefill(call)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-3)
    assert tried[0] == tried[1]
    assert len(set(tried[0])) == 2


def test_the_kind_of_a_call_follows_what_decides_speed() -> None:
    def kind(rows: int = 100, head_dim: int = 64, **options: object) -> str:
        q = torch.empty(1, rows, 4, head_dim)
        args = build_args(q, q, q, **options)
        return prefill.kind(AttentionCall(**{name: getattr(args, name) for name in AttentionCall._fields}))

    assert kind() == kind(rows=120)
    assert len({kind(), kind(rows=130), kind(head_dim=72), kind(causal=True), kind(window=(5, 5))}) == 5
