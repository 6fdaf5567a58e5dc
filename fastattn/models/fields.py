"""Typed reading of metadata that nobody has checked yet (config.json, GGUF key-values)."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..spec import CheckpointError

_MISSING: Any = object()


class Fields:
    """A mapping from a file whose values must prove their type and range.

    Every getter takes the key, and a default that stands for an absent or null value; without a default the
    key is required. A value of the wrong type or outside its range is a `CheckpointError` naming both.
    """

    def __init__(self, path: object, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, key: str, reason: str) -> NoReturn:
        raise CheckpointError(self.path, reason, self.prefix + key)

    def has(self, key: str) -> bool:
        """Present and not null."""
        return self.values.get(key) is not None

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _MISSING:
            self.fail(key, "is missing")
        return default

    def integer(self, key: str, lo: int, hi: int, default: Any = _MISSING) -> Any:
        """An int in [lo, hi]; the default is returned as it is."""
        value = self._get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"is {_show(value)}, expected an integer")
        if not lo <= value <= hi:
            self.fail(key, f"is {_show(value)}, expected {lo} to {hi}")
        return value

    def number(self, key: str, lo: float, hi: float, default: Any = _MISSING) -> Any:
        """A finite float in [lo, hi]; the default is returned as it is."""
        value = self._get(key, default)
        return value if value is default else self._number(key, value, lo, hi)

    def numbers(self, key: str, length: int, lo: float, hi: float) -> list[float]:
        """A list of exactly ``length`` finite floats in [lo, hi]."""
        value = self._get(key, _MISSING)
        if not isinstance(value, list | tuple) or len(value) != length:
            self.fail(key, f"is {_show(value)}, expected a list of {length} numbers")
        return [self._number(key, v, lo, hi) for v in value]

    def _number(self, key: str, value: Any, lo: float, hi: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(key, f"is {_show(value)}, expected a number")
        if not (abs(value) < 1e300 and math.isfinite(value) and lo <= value <= hi):
            self.fail(key, f"is {_show(value)}, expected a finite number from {lo:g} to {hi:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.fail(key, f"is {_show(value)}, expected true or false")
        return value

    def string(self, key: str, default: Any = _MISSING) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            self.fail(key, f"is {_show(value)}, expected a string")
        return value

    def table(self, key: str) -> Fields:
        """A nested mapping, empty when absent or null."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            self.fail(key, f"is {_show(value)}, expected an object")
        return Fields(self.path, value, f"{self.prefix}{key}.")

    def ids(self, key: str, vocab: int) -> tuple[int, ...]:
        """Token ids below ``vocab``: an integer or a list of integers; () when absent.

        -1, which some converters write for "none", is none.
        """
        value = self._get(key, [])
        listed = [item for item in (value if isinstance(value, list) else [value]) if item != -1]
        for item in listed:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab:
                self.fail(key, f"is {_show(value)}, expected token ids from 0 to {vocab - 1}")
        return tuple(listed)

    def token_id(self, key: str, vocab: int) -> int | None:
        """One token id below ``vocab``, None when absent."""
        found = self.ids(key, vocab)
        if len(found) > 1:
            self.fail(key, f"is {_show(found)}, expected one token id")
        return found[0] if found else None


def _show(value: Any) -> str:
    """A short text of a value that may be very long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    text = reprlib.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes; anything else is a `CheckpointError`.

    NaN and Infinity, which JSON does not have but Python's reader takes, are refused.
    """

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        size = path.stat().st_size
        if size > limit:
            raise CheckpointError(path, f"has {size} bytes, expected at most {limit}")
        value = json.loads(path.read_bytes().decode("utf-8"), parse_constant=refuse)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"holds a JSON {type(value).__name__}, expected an object")
    return value
