"""Types of command-line arguments: comma-separated sweeps, names of data types, links, sync policies."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence

import torch

from fastattn.models import random_llama
from fastattn.parallel.policies import parse
from fastattn.spec import Link

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ACTS = {"none": "", "int8": "int8"}  # may activations be quantized: to what, in `fastattn.load`'s terms


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected at least 1")
    return value


def model(text: str) -> str:
    """Any model's name or path; of those with random weights only ones that there can be."""
    try:
        random_llama.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def sweep(text: str) -> tuple[int, ...]:
    """Integers of at least 1, separated by commas: "1,4,16"."""
    return tuple(positive(item) for item in text.split(","))


def several(text: str) -> tuple[int, ...]:
    """As `sweep`, of at least 2: ranks that exchange something."""
    found = sweep(text)
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"{min(found)}, expected at least 2")
    return found


def names(accepted: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Names out of ``accepted``, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in accepted:
                raise argparse.ArgumentTypeError(f"{name!r}, expected {', '.join(accepted)}")
        return chosen

    return parse


def sync(text: str) -> str:
    """What ``fastattn generate --sync`` takes: a policy, with a schedule or without, or a plan's file."""
    try:
        if not text.endswith(".json"):
            parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def policy(text: str) -> str:
    """A policy without a schedule."""
    if text.endswith(".json") or parse(sync(text))[1].name != "plain":
        raise argparse.ArgumentTypeError(f"{text!r}, expected a policy alone: a schedule needs a model")
    return text


_BITS_PER_S = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def link(text: str) -> Link:
    """A rate and a one-way latency, in tc's units: "100mbit/1ms"."""
    rate, _, latency = text.partition("/")
    bits = _quantity(rate, _BITS_PER_S)
    if not bits:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected a rate > 0 like 10gbit, 100mbit or 64kbit first"
        )
    return Link(_quantity(latency, _SECONDS), bits / 8)


def links(text: str) -> tuple[Link, ...]:
    """Links separated by commas."""
    return tuple(link(item) for item in text.split(","))


def duration(text: str) -> float:
    """Seconds: "50us", "1.5ms", "2s"."""
    return _quantity(text, _SECONDS)


def link_name(given: Link) -> str:
    """As `link` reads it."""
    return f"{_name(8 * given.bytes_per_s, _BITS_PER_S)}/{_name(given.latency_s, _SECONDS)}"


def _quantity(text: str, units: Mapping[str, float]) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", text)
    if not found or found[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number and one of {', '.join(units)}")
    return float(found[1]) * units[found[2]]


def _name(value: float, units: Mapping[str, float]) -> str:
    """In the largest unit of which there is at least one."""
    unit = max((u for u in units if units[u] <= value * (1 + 1e-9)), key=units.__getitem__, default="")
    unit = unit or min(units, key=units.__getitem__)
    return f"{value / units[unit]:.6g}{unit}"
