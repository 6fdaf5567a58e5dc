"""Types of command-line arguments: comma-separated sweeps, names of data types."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

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


def sweep(text: str) -> tuple[int, ...]:
    """Integers of at least 1, separated by commas: "1,4,16"."""
    return tuple(positive(item) for item in text.split(","))


def names(accepted: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Names out of ``accepted``, separated by commas."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in accepted:
                raise argparse.ArgumentTypeError(f"{name!r}, expected {', '.join(accepted)}")
        return chosen

    return parse
