"""Types of command-line arguments."""

from __future__ import annotations

import argparse


def shares(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 2,1") from None
