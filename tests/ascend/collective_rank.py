"""One rank of a tiny model under tiled+matmul_sum: collective_rank.py MODEL FOLDER.

The ranks meet over gloo on the CPU; HCCL and the chip are stood in for: each call of npu_mm_all_reduce_base
is written down and computed as documented, product and sum. Prints the logits' difference from `exact`.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastattn
from ascend_ops import router
from ascend_ops.router import Invocation
from fastattn.collectives import matmul_sum
from fastattn.collectives.exchange import traffic
from fastattn.parallel import group, plan

ROWS = 600


def record(calls: list[Invocation]) -> Any:
    def run(self: Invocation) -> Any:
        x1, x2, hcom = self.args
        assert hcom == "hccl_world"
        calls.append(self)
        total = (x1.float() @ x2.float()).to(x1.dtype)
        dist.all_reduce(total)
        return self.finish(total)

    return run


@torch.inference_mode()
def main() -> None:
    model_folder, folder = sys.argv[1], Path(sys.argv[2])
    g = group.init()
    calls: list[Invocation] = []
    matmul_sum.on_npu = lambda g: True
    matmul_sum.all_reduce.hcom = lambda group, rank: "hccl_world"
    matmul_sum.router.current = lambda: router.chip_of("910b")
    Invocation.__call__ = record(calls)  # type: ignore[method-assign]
    model = fastattn.load(model_folder, dtype="float16", tp=g)
    ids = [[(7 * i + 3) % 300 for i in range(ROWS)]]
    decoder, found = model.decoder, {}
    for sync in ("exact", "tiled:tiles=1/1+matmul_sum"):
        p = plan.uniform(sync, "", model.config.num_layers, g, 2)
        decoder.policy, decoder.schedule = p.points.__getitem__, p.schedule
        traffic.clear()
        found[sync] = (model.logits(ids), dict(traffic.calls))
    before = len(calls)
    model.logits([[5, 6, 7]])
    (exact, _), (fused, counts) = found.values()
    plain = [(i.namespace, i.name, i.args, i.kwargs) for i in calls]
    (folder / f"calls{g.rank}.pickle").write_bytes(pickle.dumps(plain))
    error = float((fused[0] - exact[0]).abs().max()) if g.rank == 0 else 0.0
    scale = float(exact[0].abs().max()) if g.rank == 0 else 1.0
    print(
        json.dumps({"calls": before, "later": len(calls) - before, "counts": counts, "error": error / scale})
    )
    group.shutdown(g)


if __name__ == "__main__":
    main()
