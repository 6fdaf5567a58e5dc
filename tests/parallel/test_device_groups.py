"""What groups over NCCL and HCCL refuse: no messages travel there between pairs of ranks."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastattn.collectives import exchange, fused_norm
from fastattn.collectives.exact import Exact
from fastattn.models.trial import Trials
from fastattn.parallel import plan as plans
from fastattn.parallel.group import single
from fastattn.spec import TPGroup, UnsupportedError

LAYERS = 3
TWO = TPGroup(None, 0, 2, 1.0, (0.75, 0.25))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("fused_norm", ""),
        ("token_weave", ""),
        ("tiled", ""),
        ("token_weave+fused_norm", "token_weave overlaps nothing with fused_norm"),
    ],
)
def test_a_weave_hides_no_symmetric_memory(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over gloo everything combines; over NCCL a fused norm is a kernel in the stream that computes."""
    plan = plans.uniform(text, "model", LAYERS, TWO, 2)
    assert plans.reasons_together(plan, single()) == []
    over_nccl(monkeypatch)
    found = plans.reasons_together(plan, TWO)
    assert len(found) == (2 if reason else 0)  # one a phase
    assert all(reason in line and "nccl" in line for line in found)
    with pytest.raises(UnsupportedError, match=reason) if reason else nullcontext():
        plans.verify(plan, TWO, "model", LAYERS, 64, torch.float32)


def test_a_scattered_residual_is_gathered_by_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    over_nccl(monkeypatch)
    plan = plans.uniform({"prefill": "fused_norm", "decode": "exact"}, "model", LAYERS, TWO, 2)
    mixed = {p: Exact() if p.phase == "prefill" and p.site == "mlp" else q for p, q in plan.points.items()}
    (found,) = plans.reasons_together(plan._replace(points=mixed), TWO)
    assert "policy exact needs the residual that fused_norm scattered" in found
    before_any = {p: Exact() if p.layer == 0 and p.site == "attn" else q for p, q in plan.points.items()}
    assert plans.reasons_together(plan._replace(points=before_any), TWO) == []


def test_no_plan_is_measured_over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of time, and the clock, are of messages between CPUs."""
    over_nccl(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"travel over gloo, not nccl; name exact or tiled\+exact"):
        Trials(SimpleNamespace(group=TWO), 8, 1)  # type: ignore[arg-type]


def over_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has groups say that they exchange through NCCL, of which this machine has none, and agree."""
    for module in (exchange, fused_norm):
        monkeypatch.setattr(module, "device_of", lambda group: torch.device("cuda"))
    monkeypatch.setattr(exchange.dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(plans, "agree", lambda group, what, value: None)
