"""Sync plans: which policy sums which point, and in what order, for one model on so many ranks.

On disk a plan is a JSON object that a person can read and edit::

    {"version": 1, "model": FINGERPRINT, "world": 2, "split": [0.5, 0.5], "num_layers": 30,
     "rules": [{"phase": "prefill", "site": "attn", "layers": [0, 30], "policy": {"name": "tiled"}}, ...],
     "schedule": {"prefill": {"name": "token_weave"}, "decode": {"name": "plain"}},
     "quality": {...}}

A rule holds for layers first to last (one past the end); together the rules name each point once.
"""

# ruff: noqa: TRY004 (values come from files and command lines: whatever is wrong is a ValueError)
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any, cast, get_args

import torch

from ..collectives.exchange import against_messages, agree
from ..shares import normalised, usable
from ..spec import (
    MAX_LAYERS,
    Phase,
    Point,
    Schedule,
    Site,
    SyncPlan,
    SyncPolicy,
    TPGroup,
    UnsupportedError,
)
from .policies import is_number, parse, policy_from_json, policy_to_json, schedule_from_json, schedule_to_json

VERSION = 1
PHASES: tuple[Phase, ...] = get_args(Phase)
SITES: tuple[Site, ...] = get_args(Site)
_LIMIT = 64 << 20  # bytes of a file
_KEYS = ("version", "model", "world", "split", "num_layers", "rules", "schedule", "quality")


def points_of(num_layers: int) -> list[Point]:
    """Every sync point of a model."""
    return [Point(n, site, phase) for phase, site, n in product(PHASES, SITES, range(num_layers))]


def uniform(
    text: str | Mapping[Phase, str], model_hash: str, num_layers: int, g: TPGroup, item_bytes: int
) -> SyncPlan:
    """One policy (`policies.parse`) for all points, or one a phase.

    ``item_bytes``: of an activation, for policies that send those as they are.
    """
    texts = dict.fromkeys(PHASES, text) if isinstance(text, str) else text
    parsed = {phase: parse(texts.get(phase, "exact")) for phase in PHASES}
    policies = {phase: with_item_bytes(policy, item_bytes) for phase, (policy, _) in parsed.items()}
    points = {p: policies[p.phase] for p in points_of(num_layers)}
    return SyncPlan(
        model_hash, g.world, g.weights, points, {phase: s for phase, (_, s) in parsed.items()}, {}
    )


def chosen(
    sync: str | Path | SyncPlan, model_hash: str, num_layers: int, hidden: int, dtype: torch.dtype, g: TPGroup
) -> SyncPlan:
    """The plan that ``sync`` means, for this model and checked on all ranks: a policy for all points as text
    (`policies.parse`), a plan, or the .json file of one. Raises as `verify` does.
    """
    if not isinstance(sync, SyncPlan):
        file = isinstance(sync, Path) or sync.endswith(".json")
        sync = read(sync) if file else uniform(str(sync), model_hash, num_layers, g, dtype.itemsize)
    points = {point: with_item_bytes(policy, dtype.itemsize) for point, policy in sync.points.items()}
    plan = sync._replace(points=points)
    verify(plan, g, model_hash, num_layers, hidden, dtype)
    return plan


def with_item_bytes(policy: SyncPolicy, item_bytes: int) -> SyncPolicy:
    """The policy for activations of that size."""
    values: Any = policy
    if hasattr(values, "of"):
        return cast("SyncPolicy", replace(values, of=with_item_bytes(values.of, item_bytes)))
    if hasattr(values, "item_bytes"):
        return cast("SyncPolicy", replace(values, item_bytes=item_bytes))
    return policy


# ------------------------------------------------------------------------------------------------- JSON
def to_json(plan: SyncPlan) -> dict[str, Any]:
    """The object above."""
    layers = 1 + max(p.layer for p in plan.points)
    rules = []
    for phase, site in product(PHASES, SITES):
        listed = [(n, policy_to_json(plan.points[Point(n, site, phase)])) for n in range(layers)]
        for policy, run in groupby(listed, key=lambda pair: pair[1]):
            span = [n for n, _ in run]
            rules.append({"phase": phase, "site": site, "layers": [span[0], span[-1] + 1], "policy": policy})
    return {
        "version": plan.version,
        "model": plan.model_hash,
        "world": plan.world,
        "split": list(plan.split),
        "num_layers": layers,
        "rules": rules,
        "schedule": {phase: schedule_to_json(s) for phase, s in plan.schedule.items()},
        "quality": dict(plan.quality),
    }


def from_json(value: object) -> SyncPlan:
    """The inverse of `to_json`; ValueError names what is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"a plan is an object, this is {value!r:.80}")
    _exact_keys(value, _KEYS, "the plan")
    if value["version"] != VERSION:
        raise ValueError(f"version: {value['version']!r}, expected {VERSION}")
    layers = _integer(value, "num_layers", 1)
    if layers > MAX_LAYERS:
        raise ValueError(f"num_layers: {layers!r:.40}, expected at most {MAX_LAYERS}")
    world = _integer(value, "world", 1)
    split = value["split"]
    if not isinstance(split, list) or len(split) != world or not _positive(split):
        raise ValueError(f"split: {split!r:.80}, expected {world} positive numbers")
    if not isinstance(value["model"], str) or not isinstance(value["quality"], dict):
        raise ValueError("model, quality: expected a text and an object")
    schedule = value["schedule"]
    if not isinstance(schedule, dict) or set(schedule) != set(PHASES):
        raise ValueError(f"schedule: {schedule!r:.80}, expected an object of {', '.join(PHASES)}")
    schedules: dict[Phase, Schedule] = {p: schedule_from_json(schedule[p]) for p in PHASES}
    points = _points(value["rules"], layers)
    return SyncPlan(value["model"], world, normalised(split), points, schedules, value["quality"])


def _points(rules: object, layers: int) -> dict[Point, SyncPolicy]:
    if not isinstance(rules, list):
        raise ValueError(f"rules: {rules!r:.80}, expected a list")
    points: dict[Point, SyncPolicy] = {}
    for i, rule in enumerate(rules):
        where = f"rules[{i}]"
        if not isinstance(rule, dict):
            raise ValueError(f"{where}: {rule!r:.80}, expected an object")
        _exact_keys(rule, ("phase", "site", "layers", "policy"), where)
        if rule["phase"] not in PHASES or rule["site"] not in SITES:
            raise ValueError(f"{where}: phase {rule['phase']!r:.40}, site {rule['site']!r:.40}")
        span = rule["layers"]
        if (
            not isinstance(span, list)
            or [type(x) for x in span] != [int, int]
            or not (0 <= span[0] < span[1] <= layers)
        ):
            raise ValueError(f"{where}: layers {span!r:.80}, expected [first, end] within {layers}")
        try:
            policy = policy_from_json(rule["policy"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for n in range(*span):
            point = Point(n, rule["site"], rule["phase"])
            if point in points:
                raise ValueError(f"{where}: {point} has a policy already")
            points[point] = policy
    missing = [p for p in points_of(layers) if p not in points]
    if missing:
        raise ValueError(
            f"rules: none for {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        )
    return points


def read(path: str | Path) -> SyncPlan:
    """A plan from a file; ValueError names file and reason."""
    try:
        if Path(path).stat().st_size > _LIMIT:
            raise ValueError(f"larger than {_LIMIT >> 20} MiB")
        return from_json(json.loads(Path(path).read_text()))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def write(path: str | Path, plan: SyncPlan) -> None:
    """Writes the file whole or, on an error, not at all."""
    final = Path(path)
    draft = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(to_json(plan), indent=1) + "\n")
        draft.replace(final)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- checks
def verify(
    plan: SyncPlan, g: TPGroup, model_hash: str, num_layers: int, hidden: int, dtype: torch.dtype
) -> None:
    """Checks on every rank that the plan is for this model and these ranks, and the same everywhere.

    Raises ValueError or UnsupportedError with the reason, `SyncError` when the ranks' plans differ.
    """
    if plan.model_hash != model_hash:
        raise ValueError(f"the plan is for another model ({plan.model_hash[:12]}, this is {model_hash[:12]})")
    if plan.world != g.world:
        raise ValueError(f"the plan is for {plan.world} ranks, there are {g.world}")
    if any(abs(a - b) > 1e-6 for a, b in zip(plan.split, g.weights, strict=True)):
        raise ValueError(f"the plan is for the split {plan.split}, this is {g.weights}")
    if set(plan.points) != set(points_of(num_layers)):
        raise ValueError(f"the plan is for {len(plan.points) // 4} layers, the model has {num_layers}")
    for point, policy in plan.points.items():
        reasons = policy.reasons(point, 1, hidden, dtype, g)
        if reasons:
            raise UnsupportedError(f"{point}: policy {policy.name}: {'; '.join(reasons)}")
    if reasons := reasons_together(plan, g):
        raise UnsupportedError("; ".join(reasons))
    agree(g, "the sync plan", json.dumps(to_json(plan), sort_keys=True).encode())


def reasons_together(plan: SyncPlan, g: TPGroup) -> list[str]:
    """Why policies and schedules that work alone do not work together in this group.

    Without messages between ranks a fused norm is a kernel over symmetric memory: in the stream that
    computes, so no other tile's work hides it, and its scattered residual stays scattered.
    """
    reasons: list[str] = []
    if not (why := "; ".join(against_messages(g))):
        return reasons
    layers = 1 + max(p.layer for p in plan.points)
    for phase in PHASES:
        order = [Point(n, site, phase) for n, site in product(range(layers), SITES)]
        if plan.schedule[phase].name != "plain" and any(plan.points[p].scatters for p in order):
            reasons.append(
                f"{phase}: {plan.schedule[phase].name} overlaps nothing with fused_norm here, expected "
                f"one of the two, or exact sums under the schedule ({why})"
            )
        for before, after in pairwise(order):
            if plan.points[before].scatters and plan.points[after].needs_full_residual:
                reasons.append(
                    f"{after}: policy {plan.points[after].name} needs the residual that "
                    f"{plan.points[before].name} scattered at {before}; {why}"
                )
                break
    return reasons


def _exact_keys(value: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in keys:
        if key not in value:
            raise ValueError(f"{where}: {key!r} is missing")
    for key in value:
        if key not in keys:
            raise ValueError(f"{where}: {key!r:.40} is unknown, expected {', '.join(keys)}")


def _integer(value: Mapping[str, Any], key: str, lowest: int) -> int:
    found = value[key]
    if isinstance(found, bool) or not isinstance(found, int) or found < lowest:
        raise ValueError(f"{key}: {found!r:.40}, expected an integer >= {lowest}")
    return found


def _positive(listed: list[Any]) -> bool:
    return all(map(is_number, listed)) and usable(listed)
