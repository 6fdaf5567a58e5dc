"""Sync plans as files and policies as JSON and text: round trips, and a reason for everything refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn.collectives.compressed import Compressed
from fastattn.collectives.direct import Direct
from fastattn.collectives.dropped import Dropped
from fastattn.collectives.exact import Exact
from fastattn.collectives.fused_norm import FusedNorm
from fastattn.collectives.pairwise import SCHEMES, Pairwise
from fastattn.collectives.policy import Sum
from fastattn.collectives.star import Star
from fastattn.collectives.tiled import Tiled
from fastattn.parallel import plan as plans
from fastattn.parallel.group import single
from fastattn.parallel.policies import (
    parse,
    policy_from_json,
    policy_to_json,
    schedule_from_json,
    schedule_to_json,
    to_text,
)
from fastattn.parallel.schedule import Plain, TokenWeave
from fastattn.quant.codec import Codec
from fastattn.spec import Schedule, SyncPlan, SyncPolicy, TPGroup, UnsupportedError

LAYERS = 3
TWO = TPGroup(None, 0, 2, 1.0, (0.75, 0.25))
ITEMS = st.sampled_from((2, 4, 8))
CODECS = st.builds(
    Codec,
    element=st.sampled_from(("e1m1", "e2m1", "e2m2", "e4m3", "int4", "int8")),
    block=st.sampled_from((8, 16, 32)),
    scale=st.sampled_from(("floor", "even", "ceil", "e4m3", "fp16")),
    search=st.booleans(),
    rotate=st.sampled_from((0, 32, 64)),
    outliers=st.sets(st.integers(0, 95), max_size=4).map(lambda s: tuple(sorted(s))),
)
PAIRWISE: st.SearchStrategy[Pairwise] = st.builds(
    Direct, scheme=st.sampled_from(SCHEMES), two_step_bytes=st.integers(0, 1 << 20), item_bytes=ITEMS
) | st.builds(Compressed, scheme=st.sampled_from(SCHEMES), codec=CODECS)
SUMS: st.SearchStrategy[Sum] = (
    st.builds(Exact, ITEMS) | st.builds(Star, st.integers(0, 1), item_bytes=ITEMS) | PAIRWISE
)
SHARES = st.integers(1, 100) | st.floats(1e-3, 1e30)
TILES = st.lists(SHARES, min_size=1, max_size=5).map(tuple)
TILED = st.builds(Tiled, SUMS, TILES)
ANYWHERE: st.SearchStrategy[SyncPolicy] = SUMS | TILED | st.builds(FusedNorm, PAIRWISE)
POLICIES: st.SearchStrategy[SyncPolicy] = ANYWHERE | st.just(Dropped())
SCHEDULES: st.SearchStrategy[Schedule] = st.just(Plain()) | st.builds(
    TokenWeave, st.integers(1, 4096), TILES, st.integers(1, 256)
)


@st.composite
def plan_of(draw: st.DrawFn) -> SyncPlan:
    points = {p: draw(POLICIES if p.site == "attn" else ANYWHERE) for p in plans.points_of(LAYERS)}
    schedule = {phase: draw(SCHEDULES) for phase in plans.PHASES}
    return SyncPlan(
        "0123abcd", 2, TWO.weights, points, schedule, {"tokens": 4096, "decode": {"increase": 0.01}}
    )


def a_plan(text: str = "tiled:tiles=1/2+compressed:element=int8") -> SyncPlan:
    return plans.uniform(text, "0123abcd", LAYERS, TWO, 2)


# ------------------------------------------------------------------------------------------------ tiles
@given(SCHEDULES, st.integers(1, 5000))
def test_tiles_are_all_rows_in_order(schedule: Schedule, rows: int) -> None:
    spans = schedule.spans(rows)
    assert [n for lo, hi in spans for n in range(lo, hi)] == list(range(rows))
    assert all(lo < hi for lo, hi in spans)
    if isinstance(schedule, TokenWeave) and rows >= schedule.min_tokens:
        assert len(spans) <= len(schedule.tiles)
    else:
        assert len(spans) == 1


def test_tiles_end_at_multiples_where_the_rows_suffice() -> None:
    weave = TokenWeave(2, (1, 2, 1), multiple=16)
    assert weave.spans(130) == [(0, 32), (32, 96), (96, 130)]
    assert weave.spans(9) == [(0, 2), (2, 7), (7, 9)]
    assert weave.spans(2) == [(0, 2)]
    assert weave.spans(1) == [(0, 1)]


# ------------------------------------------------------------------------------------------ round trips
@given(POLICIES)
def test_policies_survive_json_and_text(policy: SyncPolicy) -> None:
    value = json.loads(json.dumps(policy_to_json(policy)))
    assert policy_from_json(value) == policy
    assert parse(to_text(policy)) == (policy, Plain())


@given(SCHEDULES, ANYWHERE)
def test_schedules_survive_json_and_text(schedule: Schedule, policy: SyncPolicy) -> None:
    assert schedule_from_json(json.loads(json.dumps(schedule_to_json(schedule)))) == schedule
    assert parse(f"{to_text(schedule)}+{to_text(policy)}") == (policy, schedule)


@given(plan_of())
def test_plans_survive_json(plan: SyncPlan) -> None:
    assert plans.from_json(json.loads(json.dumps(plans.to_json(plan)))) == plan


def test_equal_neighbours_become_one_rule_and_defaults_are_left_out() -> None:
    value = plans.to_json(plans.uniform("star", "0123abcd", LAYERS, TWO, 4))
    assert [rule["layers"] for rule in value["rules"]] == [[0, LAYERS]] * 4
    assert [rule["policy"] for rule in value["rules"]] == [{"name": "star"}] * 4


@pytest.mark.parametrize(
    ("text", "policy", "schedule"),
    [
        ("exact", Exact(), Plain()),
        ("star:hub=1", Star(1), Plain()),
        ("tiled:tiles=1/2+direct", Tiled(Direct(), (1, 2)), Plain()),
        ("tiled:tiles=3/", Tiled(Exact(), (3,)), Plain()),
        ("token_weave", Exact(), TokenWeave()),
        ("token_weave:tiles=2/3+fused_norm", FusedNorm(), TokenWeave(tiles=(2, 3))),
        (
            "compressed:element=int4,outliers=1/7,scheme=two_step",
            Compressed(codec=Codec(element="int4", outliers=(1, 7)), scheme="two_step"),
            Plain(),
        ),
    ],
)
def test_text(text: str, policy: SyncPolicy, schedule: Schedule) -> None:
    assert parse(text) == (policy, schedule)


# --------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'', expected one of exact, direct"),
        ("sum", "'sum', expected one of exact, direct"),
        ("star+token_weave", "'token_weave', expected one of exact"),
        ("star:hub", "'hub', expected key=value"),
        ("star:centre=1", "no parameter 'centre', it has hub, item_bytes"),
        ("star:hub=first", "star: hub: 'first', expected int"),
        ("star:hub=true", "star: hub: True, expected int"),
        ("star:hub=-1", "hub: -1"),
        ("exact+star", "exact: no parameter 'of'"),
        ("fused_norm+star", "fused_norm: of: star, expected one of direct, compressed"),
        ("tiled+tiled", "tiled: of: tiled, expected one of exact, direct, star, compressed"),
        ("tiled:tiles=1/0", "tiles: .*, expected positive shares"),
        ("tiled:tiles=1/nan", "tiles: .*, expected positive shares"),
        ("tiled:tiles=1/two", "tiles: .*, expected a list of numbers"),
        ("tiled:tiles=2", "tiles: 2, expected a list of numbers"),
        ("direct:scheme=ring", "scheme: 'ring', expected one of auto, one_step, two_step"),
        ("compressed:element=e9m9", "element"),
        ("compressed:codec=int8", "no parameter 'codec', it has scheme, two_step_bytes, element, block"),
        ("compressed:elemnt=e2m1", "no parameter 'elemnt', it has scheme, two_step_bytes, element"),
        ("tiled:of=star+direct", "tiled: no parameter 'of', it has tiles"),
        ("star:name=direct", "star: no parameter 'name', it has hub, item_bytes"),
        ("star:hub=0,hub=1", "'star:hub=0,hub=1': 'hub' twice"),
        (f"star:hub={10**400}", "star: hub: 10.*, expected an integer of 63 bits"),
        (f"token_weave:multiple=1{'0' * 400}", "token_weave: multiple: 10.*, expected an integer of 63 bits"),
        (f"tiled:tiles=1/{10**400}", "tiles: .*, expected positive shares"),
        ("tiled:tiles=1e308/1e308", "tiles: .*, expected positive shares"),
        ("token_weave:tiles=1/0", r"tiles: \(1, 0\), expected positive shares of the rows"),
        ("token_weave:min_tokens=0", "min_tokens: 0, expected at least 1"),
    ],
)
def test_text_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)


def edit(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    value = json.loads(json.dumps(plans.to_json(a_plan())))
    change(value)
    return dict(value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v.pop("rules"), "the plan: 'rules' is missing"),
        (lambda v: v.update(more=1), "the plan: 'more' is unknown, expected version, model"),
        (lambda v: v.update(version=2), "version: 2, expected 1"),
        (lambda v: v.update(world=True), "world: True, expected an integer >= 1"),
        (lambda v: v.update(num_layers=0), "num_layers: 0, expected an integer >= 1"),
        (lambda v: v.update(split=[1.0]), "split: .*, expected 2 positive numbers"),
        (lambda v: v.update(split=[1.0, -1.0]), "split: .*, expected 2 positive numbers"),
        (lambda v: v.update(split=[1.0, True]), "split: .*, expected 2 positive numbers"),
        (lambda v: v.update(split=[1.0, 10**400]), "split: .*, expected 2 positive numbers"),
        (lambda v: v.update(split=[1e308, 1e308]), "split: .*, expected 2 positive numbers"),
        (lambda v: v.update(num_layers=30_000_000), "num_layers: 30000000, expected at most 4096"),
        (lambda v: v.update(model=7), "model, quality: expected a text and an object"),
        (lambda v: v["schedule"].pop("decode"), "schedule: .*, expected an object of prefill, decode"),
        (lambda v: v["schedule"].update(decode={"name": "weave"}), "schedule: 'weave', expected"),
        (lambda v: v.update(rules={}), "rules: .*, expected a list"),
        (lambda v: v["rules"].pop(), r"rules: none for layer 0 mlp \(decode\) and 2 more"),
        (lambda v: v["rules"][1].update(layers=[0, 2]), r"rules: none for layer 2 mlp \(prefill\)$"),
        (lambda v: v["rules"].append(v["rules"][0]), r"rules\[4\]: layer 0 attn .* has a policy already"),
        (lambda v: v["rules"][2].update(layers=[0, 4]), r"rules\[2\]: layers \[0, 4\], expected .* within 3"),
        (lambda v: v["rules"][2].update(layers=[1, 1]), r"rules\[2\]: layers \[1, 1\], expected"),
        (lambda v: v["rules"][2].update(layers=[False, 3]), r"rules\[2\]: layers"),
        (lambda v: v["rules"][0].update(phase="training"), r"rules\[0\]: phase 'training'"),
        (lambda v: v["rules"][0].pop("site"), r"rules\[0\]: 'site' is missing"),
        (lambda v: v["rules"][0].update(policy={"name": "sum"}), r"rules\[0\]: policy: 'sum', expected"),
        (
            lambda v: v["rules"][3]["policy"].update(tile=2),
            r"rules\[3\]: tiled: no parameter 'tile', it has of, tiles",
        ),
        (
            lambda v: v["rules"][3]["policy"]["of"]["codec"].update(bits=4),
            r"rules\[3\]: codec: unknown key 'bits'",
        ),
        (lambda v: v["rules"][3]["policy"]["of"].update(codec=8), r"codec: 8, expected an object"),
    ],
)  # fmt: skip
def test_json_is_refused_with_the_reason(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        plans.from_json(edit(change))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(("exact", "tiled", "compressed", "prefill", "attn", "e2m1", "plain")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, x in inside for found in places(x, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


@given(JSON, st.data())
def test_damaged_json_is_a_value_error_or_a_plan(new: Any, data: st.DataObject) -> None:
    """Whatever replaces any part of a plan: what is accepted is a plan that can be written again."""
    value = plans.to_json(a_plan("token_weave+tiled+compressed:element=int8,outliers=1/2"))
    path = data.draw(st.sampled_from(places(value)))
    try:
        plan = plans.from_json(replaced(copy.deepcopy(value), path, new))
    except ValueError:
        return
    assert set(plan.points) == set(plans.points_of(LAYERS))
    assert plans.from_json(plans.to_json(plan)).points == plan.points


@given(st.text(st.sampled_from("exact+tiled:=/,019.compressed_ -"), max_size=40))
def test_damaged_text_is_a_value_error_or_a_policy(text: str) -> None:
    try:
        policy, schedule = parse(text)
    except ValueError:
        return
    assert parse(f"{to_text(schedule)}+{to_text(policy)}") == (policy, schedule)


# ------------------------------------------------------------------------------------------------ files
def test_files(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plans.write(file, a_plan())
    assert plans.read(file) == a_plan()
    plans.write(file, a_plan("star"))
    assert plans.read(file) == a_plan("star")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plans.write(file, a_plan())
    with pytest.raises(ValueError, match="expected one of"):
        plans.write(file, a_plan()._replace(points=dict.fromkeys(plans.points_of(LAYERS), object())))
    assert plans.read(file) == a_plan()
    with pytest.raises(OSError, match="No such file"):
        plans.write(tmp_path / "none" / "plan.json", a_plan())


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plans.write(file, a_plan())
    whole = file.read_bytes()
    for length in range(0, len(whole) - 2, 7):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"plan\.json: "):
            plans.read(file)


@pytest.mark.parametrize(
    "raw", [b"\xff\xfe", b"[" * 100_000, b"null", b"[]", b"1e999"], ids=lambda b: str(b[:8])
)
def test_other_files_are_refused(raw: bytes, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"plan\.json: "):
        plans.read(file)


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json: cannot be read: No such file"):
        plans.read(tmp_path / "none.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as f:
        f.truncate((64 << 20) + 1)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        plans.read(huge)


# --------------------------------------------------------------------------------------------- start-up
@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"model_hash": "fedc"}, ValueError, r"for another model \(fedc, this is 0123abcd\)"),
        ({"world": 3}, ValueError, "for 3 ranks, there are 2"),
        ({"split": (0.5, 0.5)}, ValueError, r"for the split \(0.5, 0.5\), this is \(0.75, 0.25\)"),
        (
            {"points": dict.fromkeys(plans.points_of(5), Exact())},
            ValueError,
            "for 5 layers, the model has 3",
        ),
        (
            {"points": dict.fromkeys(plans.points_of(LAYERS), Star(2))},
            UnsupportedError,
            r"layer 0 attn \(prefill\): policy star: hub is rank 2, there are 2 ranks",
        ),
        (
            {"points": dict.fromkeys(plans.points_of(LAYERS), Dropped())},
            UnsupportedError,
            r"layer 0 mlp \(prefill\): policy dropped: .*only the sync point after attention",
        ),
        (
            {"points": dict.fromkeys(plans.points_of(LAYERS), Compressed(codec=Codec(outliers=(3, 96))))},
            UnsupportedError,
            "policy compressed: outliers: channel 96, expected below hidden 96",
        ),
    ],
)
def test_a_wrong_plan_is_refused(change: dict[str, Any], error: type[Exception], reason: str) -> None:
    with pytest.raises(error, match=reason):
        plans.verify(a_plan()._replace(**change), TWO, "0123abcd", LAYERS, 96, torch.bfloat16)


def test_a_dtype_that_cannot_travel_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="dtype float64 cannot be summed on the wire"):
        plans.verify(a_plan(), TWO, "0123abcd", LAYERS, 96, torch.float64)


def test_one_rank_accepts_its_plan() -> None:
    plan = plans.uniform("exact", "0123abcd", LAYERS, single(), 2)
    plans.verify(plan, single(), "0123abcd", LAYERS, 96, torch.bfloat16)


def test_only_the_proportions_of_the_split_count() -> None:
    plan = plans.from_json(edit(lambda v: v.update(split=[6, 2])))
    assert plan.split == TWO.weights
    alone = edit(lambda v: v.update(world=1, split=[2]))
    plans.verify(plans.from_json(alone), single(), "0123abcd", LAYERS, 96, torch.bfloat16)


def test_whatever_names_the_plan_is_for_the_dtype_of_this_model(tmp_path: Path) -> None:
    file, text = tmp_path / "plan.json", "tiled+direct"
    plans.write(file, plans.uniform(text, "0123abcd", LAYERS, single(), 4))
    for sync in (text, file, str(file), plans.read(file)):
        for dtype in (torch.bfloat16, torch.float32):
            plan = plans.chosen(sync, "0123abcd", LAYERS, 96, dtype, single())
            assert set(plan.points.values()) == {Tiled(Direct(item_bytes=dtype.itemsize))}


@pytest.mark.parametrize("text", ["exact", "star:hub=1", "fused_norm", "tiled", "tiled+direct", "compressed"])
def test_item_bytes_reach_what_sends(text: str) -> None:
    """Also where the inner policy is the default one, which JSON leaves out."""
    for item_bytes in (2, 4):
        policy = plans.with_item_bytes(parse(text)[0], item_bytes)
        inner = getattr(policy, "of", policy)
        assert getattr(inner, "item_bytes", item_bytes) == item_bytes
        assert type(policy) is type(parse(text)[0])
