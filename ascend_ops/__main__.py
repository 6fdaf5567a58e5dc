"""``python -m ascend_ops report``: every operator and kernel on this machine's NPU, checked and timed."""

from __future__ import annotations

import argparse
import sys

from . import report as reporting


def main() -> int:
    """Returns 0 if all is right, 1 if something is wrong or there is no NPU."""
    parser = argparse.ArgumentParser(prog="python -m ascend_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("report", help="run the whole matrix and print a report to send back")
    command.add_argument("--full", action="store_true", help="also long sequences, up to 32768")
    args = parser.parse_args()
    return reporting.run(full=args.full)


if __name__ == "__main__":
    sys.exit(main())
