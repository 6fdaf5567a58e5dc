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


def test_rows_past_two_billion_values() -> None:
    """The addresses say where a buffer would begin: only the one row exists."""
    from fastattn.triton_ops.reduce_norm import reduce_norm

    first, hidden = 1 << 25, 64
    partials = [random(1, hidden, seed=r) for r in range(2)]
    wanted = sum(x.clone() for x in partials)
    residual, weight = torch.zeros(1, hidden), torch.ones(hidden)
    begins = torch.tensor([x.data_ptr() - first * hidden * x.element_size() for x in partials])
    reduce_norm(begins, 2, torch.float32, residual, first, weight, 1e-5)
    assert torch.equal(residual, wanted)
    assert torch.equal(partials[0], partials[1])


def test_what_is_not_contiguous_is_refused() -> None:
    from fastattn.triton_ops.reduce_norm import multicast_reduce_norm, reduce_norm

    buffers, residual, weight = torch.zeros(2, dtype=torch.int64), torch.zeros(3, 8), torch.zeros(8)
    wide = torch.zeros(3, 16)
    for wrong, match in (
        ((buffers, wide[:, ::2], weight), r"residual: shape \(3, 8\), strides \(16, 2\)"),
        ((buffers, wide[:, :8], weight), r"residual: shape \(3, 8\), strides \(16, 1\)"),
        ((buffers, residual, wide[0, ::2]), r"weight: shape \(8,\), strides \(2,\)"),
        ((buffers, residual, wide[0]), r"weight: shape \(16,\), strides \(1,\), expected contiguous \(8,\)"),
        ((torch.zeros(4, dtype=torch.int64)[::2], residual, weight), r"buffers: strides \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            reduce_norm(wrong[0], 2, torch.float16, wrong[1], 0, wrong[2], 1e-5)
    with pytest.raises(ValueError, match="residual: shape"):
        multicast_reduce_norm(0, torch.float16, wide[:, :8], 0, weight, 1e-5)
