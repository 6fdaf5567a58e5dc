"""All-reduce + RMSNorm over symmetric memory: the ranks' shares, one after the other, against float64."""

from __future__ import annotations

import pytest
import torch

from fastattn import reference_ops
from fastattn.dispatch import unavailable
from fastattn.spec import RmsNormArgs
from tests.ops.runners import FLOATS, assert_accurate, random

pytestmark = [pytest.mark.toolchain, pytest.mark.emulate("triton")]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("world", "rows", "hidden"), [(2, 5, 64), (3, 7, 100), (4, 4, 576)], ids=str)
def test_shares_make_up_the_whole(dtype: torch.dtype, world: int, rows: int, hidden: int) -> None:
    assert not unavailable("triton")
    from fastattn.triton_ops.reduce_norm import reduce_norm

    partials = [random(rows, hidden, seed=r, dtype=dtype) for r in range(world)]
    residual, weight = random(rows, hidden, seed=9, dtype=dtype), random(hidden, seed=8, dtype=dtype)
    total = sum(x.float() for x in partials)
    wanted, wanted_residual = reference_ops.rms_norm(RmsNormArgs(total, weight, 1e-5, residual))
    buffers = torch.tensor([x.data_ptr() for x in partials])
    shares = torch.tensor_split(residual.clone(), world)
    first = 0
    for share in shares:
        reduce_norm(buffers, world, dtype, share, first, weight, 1e-5)
        first += share.shape[0]
    assert first == rows
    assert torch.equal(torch.cat(shares), wanted_residual.to(dtype))
    same_dtype = reference_ops.rms_norm(RmsNormArgs(torch.cat(shares), weight, 1e-5))[0]
    for buffer in partials:
        assert torch.equal(buffer, partials[0])
        assert_accurate(buffer, same_dtype.to(dtype), same_dtype)
    assert_accurate(partials[0].float(), wanted.to(dtype).float(), wanted)
