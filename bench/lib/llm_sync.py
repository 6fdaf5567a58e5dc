"""The sync plans of bench/llm.py: several for one loaded model, and what the link allows each."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.models.checkpoint import open_checkpoint
from fastattn.models.generate import Model
from fastattn.parallel import plan as plans
from fastattn.spec import Link, Phase, SyncPlan

from .network import PAYLOAD


def read_plans(path: str, model: Model, texts: Sequence[str]) -> dict[str, SyncPlan]:
    """The plan that each text names, checked on all ranks; ``path`` is the model's."""
    fingerprint, c, g = open_checkpoint(path).fingerprint(), model.config, model.group
    return {t: plans.chosen(t, fingerprint, c.num_layers, c.hidden_size, model.dtype, g) for t in texts}


def wire_ms(plan: SyncPlan, phase: Phase, rows: int, hidden: int, link: Link) -> float:
    """What the link takes at least for one forward: at each sync point one hop, and the bytes that the
    busiest rank sends.
    """
    sent = [p.wire_bytes(rows, hidden, plan.world) for at, p in plan.points.items() if at.phase == phase]
    return 1e3 * sum(link.latency_s + n / (link.bytes_per_s * PAYLOAD) for n in sent if n)
