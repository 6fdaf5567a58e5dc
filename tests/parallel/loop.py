"""A rank that exchanges without end, as generation does: `loop.py KIND TIMEOUT [SECONDS]`.

KIND is all_reduce, sampling, or a sync policy as text.

Given START in the environment, it first waits for the file of that name, so that a short timeout does not
count the time that Python takes to load. Prints "ready" once exchanges work; a `SyncError` ends it through
`abort`, and with SECONDS it leaves in good order after that time.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from fastattn.collectives import exchange
from fastattn.collectives.prompts import broadcast_tokens
from fastattn.parallel import group
from fastattn.parallel.policies import parse
from fastattn.spec import Epilogue, Point, Stream, SyncError, TPGroup
from tests.parallel.policy_cases import Given


def once(g: TPGroup, kind: str) -> None:
    if kind == "all_reduce":
        x = torch.ones(7, 576)
        exchange.all_reduce(g, x, "layer 0 attn (decode)").wait()
        assert torch.equal(x, torch.full_like(x, g.world))
    elif kind == "sampling":  # only rank 0 receives, the others run ahead to the broadcast
        sizes = [1000 + r for r in range(g.world)]
        exchange.gather_last(g, torch.ones(2, sizes[g.rank]), sizes, "logits")
        broadcast_tokens(g, torch.zeros(2, dtype=torch.int64) if g.rank == 0 else None, 2)
    else:
        x = torch.ones(7, 576)
        policy, _ = parse(kind)
        epilogue = Epilogue(None, lambda y, residual: (y, y if residual is None else y + residual))
        work = policy.start(Point(0, "attn", "decode"), Given(x), Stream(x, None), epilogue, g)
        hidden = work.overlap().wait().hidden
        assert hidden is not None
        torch.testing.assert_close(hidden, torch.full_like(hidden, g.world), rtol=0.05, atol=0)


def main() -> None:
    kind, timeout_s = sys.argv[1], float(sys.argv[2])
    seconds = float(sys.argv[3]) if len(sys.argv) > 3 else float("inf")
    print("loaded", flush=True)
    while "START" in os.environ and not Path(os.environ["START"]).exists():
        time.sleep(0.01)
    try:
        g = group.init(timeout_s)
    except SyncError as error:
        group.abort(group.single(), error)
    try:
        for _ in range(20):
            once(g, kind)
        print("ready", flush=True)
        flag, start = torch.zeros(1), time.monotonic()
        while not flag:
            once(g, kind)
            time.sleep(0.002)
            flag[0] = time.monotonic() - start > seconds
            exchange.broadcast(g, flag, "end of the test")
    except SyncError as error:
        group.abort(g, error)
    assert group.shutdown(g)
    print("done", flush=True)


main()
