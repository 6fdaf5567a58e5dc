"""Sync policies and schedules by name: as JSON values, and as short text for the command line.

JSON is an object with the policy's ``name`` and those of its parameters that differ from the defaults::

    {"name": "tiled", "tiles": [1, 2], "of": {"name": "compressed", "codec": {"element": "e2m1"}}}

Text gives names joined by ``+``, outer ones first, each with its parameters, and may begin with a schedule::

    star:hub=1    tiled:tiles=1/2+compressed:element=e2m1,block=16    token_weave+fused_norm
"""

# ruff: noqa: TRY004 (values come from files and command lines: whatever is wrong is a ValueError)
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

from ..collectives.compressed import Compressed
from ..collectives.direct import Direct
from ..collectives.dropped import Dropped
from ..collectives.exact import Exact
from ..collectives.fused_norm import FusedNorm
from ..collectives.matmul_sum import MatmulSum
from ..collectives.pairwise import Pairwise
from ..collectives.policy import Sum
from ..collectives.star import Star
from ..collectives.tiled import Tiled
from ..quant.codec import Codec
from ..spec import Schedule, SyncPolicy
from .schedule import Plain, TokenWeave

_ALL = (Exact, Direct, Star, Compressed, MatmulSum, Tiled, FusedNorm, Dropped)
POLICIES: dict[str, Any] = {c.name: c for c in _ALL}
SCHEDULES: dict[str, Any] = {c.name: c for c in (Plain, TokenWeave)}
_INNER = {Tiled: Sum, FusedNorm: Pairwise}  # what ``of`` may be
_CODEC = tuple(f.name for f in dataclasses.fields(Codec))
_BITS = 63  # of an integer: a float holds it too


# ------------------------------------------------------------------------------------------------- JSON
def policy_to_json(policy: SyncPolicy) -> dict[str, Any]:
    """The object above; ValueError for a policy that is not one of ours."""
    return _to_json(policy, POLICIES)


def policy_from_json(value: object) -> SyncPolicy:
    """The inverse; ValueError names the key at fault."""
    return cast("SyncPolicy", _from_json(value, POLICIES, "policy"))


def schedule_to_json(schedule: Schedule) -> dict[str, Any]:
    """As `policy_to_json`."""
    return _to_json(schedule, SCHEDULES)


def schedule_from_json(value: object) -> Schedule:
    """As `policy_from_json`."""
    return cast("Schedule", _from_json(value, SCHEDULES, "schedule"))


def _to_json(item: Any, known: Mapping[str, Any]) -> dict[str, Any]:
    if known.get(getattr(item, "name", "")) is not type(item):
        raise ValueError(f"{item!r}: expected one of {', '.join(known)}")
    values: dict[str, Any] = {"name": item.name}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if value == _default(field):
            continue
        if field.name == "of":
            value = policy_to_json(value)
        elif isinstance(value, Codec):
            plain = Codec().to_json()
            value = {key: x for key, x in value.to_json().items() if x != plain[key]}
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def _from_json(value: object, known: Mapping[str, Any], what: str) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"{what}: {value!r:.80}, expected an object with a name")
    name = value["name"]
    if name not in known:
        raise ValueError(f"{what}: {name!r}, expected one of {', '.join(known)}")
    kind = known[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments = {}
    for key, given in value.items():
        if key == "name":
            continue
        if key not in fields:
            raise ValueError(f"{name}: no parameter {key!r}, it has {', '.join(fields) or 'none'}")
        arguments[key] = _argument(kind, key, given, _default(fields[key]))
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _argument(kind: Any, key: str, given: Any, default: Any) -> Any:
    """``given`` as a value of the default's type."""
    where = f"{getattr(kind, 'name', '')}: {key}"
    if key == "of":
        policy = policy_from_json(given)
        if not isinstance(policy, _INNER[kind]):
            accepted = [n for n, c in POLICIES.items() if issubclass(c, _INNER[kind])]
            raise ValueError(f"{where}: {policy.name}, expected one of {', '.join(accepted)}")
        return policy
    if isinstance(default, Codec):
        if not isinstance(given, dict):
            raise ValueError(f"{where}: {given!r:.80}, expected an object")
        return Codec.from_json(given)
    if isinstance(default, tuple):
        if not isinstance(given, list) or not all(map(is_number, given)):
            raise ValueError(f"{where}: {given!r:.80}, expected a list of numbers")
        return tuple(given)
    accepts = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(given, accepts) or (isinstance(given, bool) and not isinstance(default, bool)):
        raise ValueError(f"{where}: {given!r:.80}, expected {' or '.join(t.__name__ for t in accepts)}")
    if isinstance(given, int) and given.bit_length() > _BITS:
        raise ValueError(f"{where}: {given!r:.80}, expected an integer of {_BITS} bits")
    return given


def is_number(x: object) -> bool:
    """Whether JSON has a number there."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


# ------------------------------------------------------------------------------------------------- text
def parse(text: str) -> tuple[SyncPolicy, Schedule]:
    """A policy, and the schedule before it (plain if none), from the short text above."""
    parts = [part.strip() for part in text.split("+")]
    schedule: Schedule = Plain()
    if parts[0].partition(":")[0] in SCHEDULES:
        schedule = schedule_from_json(_object(parts.pop(0), SCHEDULES))
    value: dict[str, Any] | None = None
    for part in reversed(parts or [Exact.name]):
        outer = _object(part, POLICIES)
        if value is not None:
            outer["of"] = value
        value = outer
    return policy_from_json(value), schedule


def _object(part: str, known: Mapping[str, Any]) -> dict[str, Any]:
    name, _, listed = part.partition(":")
    if name not in known:
        raise ValueError(f"{part!r}: {name!r}, expected one of {', '.join(known)}")
    accepted = _parameters(known[name])
    given: dict[str, Any] = {}
    for assignment in filter(None, listed.split(",")):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{part!r}: {assignment!r}, expected key=value")
        if key not in accepted:
            raise ValueError(f"{name}: no parameter {key!r}, it has {', '.join(accepted) or 'none'}")
        if key in given:
            raise ValueError(f"{part!r}: {key!r} twice")
        given[key] = _literal(text)
    codec = {key: given.pop(key) for key in _CODEC if key in given}
    return {"name": name, **given, **({"codec": codec} if codec else {})}


def _parameters(kind: Any) -> list[str]:
    """What text may set: the inner policy follows a plus, and a codec's fields stand for it."""
    fields = [f.name for f in dataclasses.fields(kind)]
    return [*(f for f in fields if f not in ("of", "codec")), *(_CODEC if "codec" in fields else ())]


def to_text(item: SyncPolicy | Schedule) -> str:
    """The short text of a policy or a schedule, as `parse` reads it; ValueError as `policy_to_json`."""
    value: dict[str, Any] | None = _to_json(item, {**POLICIES, **SCHEDULES})
    parts = []
    while value is not None:
        inner = value.pop("of", None)
        parts.append(_part(value))
        value = inner
    return "+".join(parts)


def _part(value: dict[str, Any]) -> str:
    name, given = value.pop("name"), {**value.pop("codec", {}), **value}
    listed = ",".join(f"{key}={_written(x)}" for key, x in given.items())
    return f"{name}:{listed}" if listed else name


def _written(x: Any) -> str:
    """What `_literal` reads; a list of one has a slash behind it."""
    if isinstance(x, list):
        return "/".join(map(_written, x)) + "/" * (len(x) == 1)
    if isinstance(x, bool):
        return str(x).lower()
    if isinstance(x, float):
        return str(int(x)) if x.is_integer() and x < 1e15 else str(x).replace("e+", "e")  # "+" joins policies
    return str(x)


def _literal(text: str) -> Any:
    if "/" in text:
        return [_literal(piece) for piece in text.removesuffix("/").split("/")]
    if text in ("true", "false"):
        return text == "true"
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return text
