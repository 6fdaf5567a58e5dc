"""The command line: ``fastattn generate``, ``plan``, ``quantize``, ``tune``, ``report`` and ``info``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__, dispatch
from ..parallel.group import abort
from ..spec import REPORTED
from . import generate, info, plan, quantize, report, tune


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    Errors of the user or the machine are one message on stderr and end the process with status 1, those of
    the command line itself with 2. Ctrl-C and a reader of our output that has gone end it as the shell would
    report their signals, with 130 and 141.
    """
    args = parser().parse_args(argv)
    try:
        dispatch.named()  # reads the environment, whatever the command
        status = args.run(args)
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except (KeyboardInterrupt, BrokenPipeError) as end:
        # Without an orderly exit: that would wait for exchanges, and flush to whom nobody listens.
        os._exit(130 if isinstance(end, KeyboardInterrupt) else 141)
    except REPORTED as error:
        abort(None, error)
    return status


def parser() -> argparse.ArgumentParser:
    """The command line; what it parses has ``run``, a function of it that returns the exit status."""
    whole = argparse.ArgumentParser(prog="fastattn", description=__doc__)
    whole.add_argument("--version", action="version", version=f"fastattn {__version__}")
    commands = whole.add_subparsers(dest="command", required=True)
    for name, text, add_arguments, run in (
        ("generate", "complete a text with a model", generate.add_arguments, generate.main),
        ("plan", "measure the ranks and plan their sums", plan.add_arguments, plan.main),
        ("quantize", "make a GPTQ checkpoint of a model", quantize.add_arguments, quantize.main),
        ("tune", "measure tiles of GPU kernels and remember them", tune.add_arguments, tune.main),
        ("report", "check a device, op by op, and whole models", report.add_arguments, report.main),
        ("info", "what runs here, and why the rest does not", info.add_arguments, info.main),
    ):
        command = commands.add_parser(name, help=text)
        add_arguments(command)
        command.set_defaults(run=run)
    return whole
