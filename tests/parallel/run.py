"""Runs cases on every rank of a group: prints one JSON object {case: "" or traceback}."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence

import torch

from fastattn.parallel import group
from fastattn.spec import TPGroup

Case = Callable[[TPGroup], None]


def run(cases: Sequence[Case]) -> None:
    """Every case begins with the same random state on all ranks, that of SEED."""
    seed = int(os.environ["SEED"])
    g = group.init(30)
    results = {}
    for case in cases:
        torch.manual_seed(seed)
        try:
            case(g)
            results[case.__name__] = ""
        except Exception:  # noqa: BLE001 (whatever it is becomes this rank's result)
            results[case.__name__] = f"seed {seed}\n{traceback.format_exc()}"
    assert group.shutdown(g)
    print(json.dumps(results))
