"""Calls functions on request: one JSON object a line, ``{"call": "module:function", "arguments": {...}}``.

Runs in the environment that has triton-ascend (`client` starts it). Each answer is a line as well,
``{"result": ...}`` or ``{"error": traceback}``; what the functions print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any


def plan_kernel(
    kernel: str, signature: Mapping[str, str], constants: Mapping[str, Any], chips: list[str]
) -> dict[str, Any]:
    """Lowers ``"module:function"`` and plans it for each chip: chip -> fields of `plan.Plan`."""
    from .lower import lower
    from .plan import is_950, plan

    linalg: dict[bool, str] = {}  # one text for all chips but the 950
    for chip in chips:
        if is_950(chip) not in linalg:
            linalg[is_950(chip)] = lower(kernel, signature, constants, chip)
    return {chip: plan(linalg[is_950(chip)], chip)._asdict() for chip in chips}


def main() -> None:
    """Answers until stdin ends."""
    # The answers' own file: whatever else is written to stdout must not get in between.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                module, name = request["call"].split(":")
                function = getattr(importlib.import_module(module), name)
                answer = {"result": function(**request["arguments"])}
            except Exception:  # noqa: BLE001 - the client raises it
                answer = {"error": traceback.format_exc()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
