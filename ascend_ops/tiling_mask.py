"""The tiling-mask: one small matrix from which every causal or banded block's mask is a shifted window.

FastAttention (arXiv 2410.16663) replaces the S x S mask by an M-mask of twice the block's
sides. Ours has BLOCK_Q rows, and as many columns as the band's edge can pass a block in ways: a few hundred
KiB, whatever the length of the sequences. It is float32, although one bit would do, because a narrower one
needs a widened copy beside it in the Unified Buffer, the scarcest memory (docs/ascend.md has the figures).
A window's element (i, j) is

    0 where 0 <= reach + i - j <= width, else -inf,

``reach`` being how far row 0 sees past the block's first key. Blocks that are seen whole, or not at all, need
no mask and none is read for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .capture import made_once

#: Past any position: sums of a position and two such bounds fit int32.
UNBOUNDED = 1 << 29


class TilingMask(NamedTuple):
    """``matrix[i, origin - reach + j]`` is the mask of key j for row i; `kernels.prefill` reads it so."""

    matrix: Tensor  # float32 (block_q, columns)
    origin: int
    skip: int  # width of the band that is left out: a block inside it sees everything
    left: int  # the bounds, UNBOUNDED for None
    right: int


def tiling_mask(
    block_q: int, block_k: int, left: int | None, right: int | None, device: torch.device
) -> TilingMask:
    """The mask of blocks (block_q, block_k) of the band (left, right); cached, one for all wide bands.

    Raises ValueError when both bounds are None: such a call has no mask.
    """
    if left is None and right is None:
        raise ValueError("left and right are None: an unbounded band has no mask")
    lo, hi = (UNBOUNDED if n is None else max(-UNBOUNDED, min(n, UNBOUNDED)) for n in (left, right))
    width = lo + hi
    # No block of a wide band has both edges: between them all wide bands look alike. Without a left edge
    # reach stops where the block is seen whole.
    kept = min(width, block_q + block_k - 2)
    origin = block_k - 1 if left is None else kept + block_k
    matrix = _matrix(block_q, block_k, kept, origin, device)
    return TilingMask(matrix, origin, width - kept, lo, hi)


@made_once(64)
def _matrix(block_q: int, block_k: int, width: int, origin: int, device: torch.device) -> Tensor:
    # reach goes from -block_q, all hidden, to origin.
    # Made where it is used: a capture refuses copies from the host.
    i = torch.arange(block_q, device=device)[:, None]
    x = torch.arange(origin + block_q + block_k, device=device)[None, :]
    hidden = (origin - x + i < 0) | (origin - x + i > width)
    return torch.zeros(hidden.shape, dtype=torch.float32, device=device).masked_fill_(hidden, -torch.inf)
