"""What commands share: the launcher's ranks, text files, and errors that are one line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..parallel import group as ranks
from ..spec import REPORTED, SyncError, TPGroup


def add_rank_arguments(p: argparse.ArgumentParser) -> None:
    """The arguments that `on_ranks` and `parallel.group.set_threads` take."""
    p.add_argument("--threads", type=int, help="per rank; default: this machine's cores over its ranks")
    p.add_argument("--split", type=_shares, help="shares of the work of the ranks, such as 2,1")
    p.add_argument("--timeout", type=float, help="seconds a rank waits for another (default 60)")


def on_ranks(
    args: argparse.Namespace, work: Callable[[argparse.Namespace, TPGroup], None], device: str = "cpu"
) -> int:
    """``work(args, group)`` on the ranks that the launcher describes; returns the exit status 0.

    One of `spec.REPORTED` is one message on stderr, which names the rank, and ends the process with status 1.
    """
    group = None
    try:
        group = ranks.init(args.timeout, args.split, device)
        work(args, group)
        if not ranks.shutdown(group):
            raise SyncError(group.rank, "shutdown", "an exchange still hangs")
    except BrokenPipeError:
        raise
    except REPORTED as error:
        ranks.abort(group, error)
    return 0


def read_text(path: str) -> str:
    """The text of a file. Raises ValueError when it is not UTF-8, OSError when it cannot be read."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from error


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 2,1") from None
