"""One rank of `test_symmetric.test_several_ranks_on_one_gpu`: the policy on the GPU against float64."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fastattn import reference_ops
from fastattn.collectives import symmetric
from fastattn.collectives.fused_norm import FusedNorm
from fastattn.collectives.sums import row_spans
from fastattn.models.llama import RmsNorm
from fastattn.parallel import group
from fastattn.spec import Epilogue, PackedWeight, Point, RmsNormArgs, Stream
from tests.ops.runners import assert_accurate, random


class Given:
    """A half-block whose partial result is known."""

    row_parallel: PackedWeight

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.rows = x, x.shape[0]

    def partial(self, lo: int, hi: int, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.x[lo:hi]

    def gemm_input(self, lo: int, hi: int) -> torch.Tensor:
        raise NotImplementedError


def main() -> None:
    """gloo, since NCCL refuses ranks that share a device."""
    g = group.init(60)
    torch.cuda.set_device(0)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows in (1, 7, 300):
            partials = [random(rows, 4096, seed=r, dtype=dtype) for r in range(g.world)]
            start, weight = random(rows, 4096, seed=8, dtype=dtype), random(4096, seed=9, dtype=dtype)
            norm = RmsNorm(weight.cuda(), 1e-5)
            policy, point = FusedNorm(), Point(0, "attn", "prefill")
            out = policy.start(
                point, Given(partials[g.rank].cuda()), Stream(start.cuda(), None), Epilogue(None, norm), g
            ).wait()
            total = sum(x.float() for x in partials)
            residual = reference_ops.rms_norm(RmsNormArgs(total, weight, 1e-5, start))[1].to(dtype)
            lo, hi = row_spans(rows, g.world)[g.rank]
            assert out.rows == (lo, hi)
            assert torch.equal(out.residual.cpu(), residual[lo:hi])
            wanted = reference_ops.rms_norm(RmsNormArgs(residual, weight, 1e-5))[0]
            assert out.hidden is not None
            assert_accurate(out.hidden.cpu(), wanted.to(dtype), wanted)
    call = symmetric.Call(300, 4096, torch.float32, torch.device("cuda", 0))
    assert symmetric.memory(call, g) is not None
    print(f"rank {g.rank} over symmetric memory", flush=True)
    dist.barrier()
    assert group.shutdown(g)


if __name__ == "__main__":
    main()
