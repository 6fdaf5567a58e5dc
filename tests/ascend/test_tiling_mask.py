"""The tiling-mask: every window of it is the mask of its block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_ops import capture
from ascend_ops.tiling_mask import tiling_mask

CPU = torch.device("cpu")
BOUND = st.one_of(st.none(), st.integers(0, 400))


@given(
    block_q=st.sampled_from((16, 32, 64)),
    block_k=st.sampled_from((1, 8, 16, 64)),
    left=BOUND,
    right=BOUND,
    diagonal=st.integers(-700, 700),
)
def test_windows(block_q: int, block_k: int, left: int | None, right: int | None, diagonal: int) -> None:
    """``diagonal``: the slot of row 0's own position, relative to the block's first key."""
    if left is None and right is None:
        with pytest.raises(ValueError, match="left and right are None"):
            tiling_mask(block_q, block_k, left, right, CPU)
        return
    mask = tiling_mask(block_q, block_k, left, right, CPU)
    # As the kernel finds its window.
    reach = diagonal + mask.right
    reach = max(min(reach, block_k - 1), reach - mask.skip)
    reach = min(max(reach, -block_q), mask.origin)
    first = mask.origin - reach
    window = mask.matrix[:, first : first + block_k]
    assert window.shape == (block_q, block_k)
    position = diagonal + torch.arange(block_q)[:, None]
    key = torch.arange(block_k)[None, :]
    seen = torch.ones(block_q, block_k, dtype=torch.bool)
    if left is not None:
        seen &= key >= position - left
    if right is not None:
        seen &= key <= position + right
    assert torch.equal(window == 0, seen)
    assert torch.equal(window == -torch.inf, ~seen)


def test_one_matrix_serves_all_wide_bands_and_lengths() -> None:
    causal = tiling_mask(128, 128, None, 0, CPU)
    assert causal.matrix is tiling_mask(128, 128, None, 0, CPU).matrix
    wide = [tiling_mask(128, 128, left, 0, CPU) for left in (300, 4096, 1 << 20)]
    assert len({id(mask.matrix) for mask in wide}) == 1
    assert causal.matrix.nbytes <= wide[0].matrix.nbytes <= 512 * 1024


def test_captures_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may use what was there before it; what its capture makes stays its own."""
    before = tiling_mask(128, 128, 77, 0, CPU).matrix
    monkeypatch.setattr(capture, "capturing", lambda device: True)
    assert tiling_mask(128, 128, 77, 0, CPU).matrix is before
    inside = tiling_mask(128, 128, 78, 0, CPU).matrix
    monkeypatch.undo()
    outside = tiling_mask(128, 128, 78, 0, CPU).matrix
    assert outside is not inside
    assert torch.equal(outside, inside)
    assert tiling_mask(128, 128, 78, 0, CPU).matrix is outside


def test_few_matrices_are_kept() -> None:
    made = []
    kept = capture.made_once(2)(lambda n, device: made.append(n) or torch.zeros(n, device=device))
    for n in (1, 2, 1, 3, 1, 3):
        kept(n, CPU)
    assert made == [1, 2, 3, 1]


class Devices(TorchDispatchMode):
    """Notes where each operation's result is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **kwargs or {})
        self.seen.add(found.device.type)
        return found


@pytest.mark.parametrize("window", [(None, 0), (50, None), (3, 2)])
def test_it_is_made_on_its_device(window: tuple[int | None, int | None]) -> None:
    """Without a copy from the host, which a capture refuses."""
    with Devices() as devices:
        found = tiling_mask(16, 16, *window, torch.device("meta")).matrix
    assert devices.seen == {"meta"}
    same = tiling_mask(16, 16, *window, CPU).matrix
    assert (found.shape, found.dtype) == (same.shape, torch.float32)
