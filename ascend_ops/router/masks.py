"""The masks that CANN's operators take, made once per device.

Causal and banded calls never have an S x S mask on 910B and newer: ``sparse_mode`` 2 to 4 take one
2048 x 2048 triangle for any length, with which the operator masks each block on the diagonal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..capture import made_once

COMPRESSED = 2048
NZ_BLOCK = 16  # columns of a fractal block of 16-bit values
_UNBOUNDED = 2147483647
FRACTAL_NZ = 29  # of aclFormat
_HIDDEN = -10000.0  # what ATB's documents and tests add to a hidden score of a compressed mask


@made_once(8)
def compressed(device: torch.device) -> Tensor:
    """bool (2048, 2048), True above the diagonal: what `sparse_mode` 2, 3 and 4 take (True: hidden)."""
    return torch.ones((COMPRESSED, COMPRESSED), dtype=torch.bool, device=device).triu_(1)


def band(left: int | None, right: int | None, device: torch.device) -> dict[str, Any]:
    """The arguments that hide what is outside of a bottom-right aligned band, an unbounded one included."""
    found: dict[str, Any] = {"atten_mask": compressed(device)}
    if left is None and right == 0:
        return found | {"sparse_mode": 3}
    before, after = (_UNBOUNDED if n is None else min(n, _UNBOUNDED) for n in (left, right))
    return found | {"sparse_mode": 4, "pre_tokens": before, "next_tokens": after}


@made_once(8)
def compressed_additive(device: torch.device) -> Tensor:
    """float16 (2048, 2048), 0 where seen: what `_npu_paged_attention_splitfuse_v2` takes."""
    return torch.zeros((COMPRESSED, COMPRESSED), dtype=torch.float16, device=device).masked_fill_(
        compressed(device), _HIDDEN
    )


@made_once(8)
def compressed_nz(device: torch.device) -> Tensor:
    """`compressed_additive` as NZ, (1, 128, 2048, 16): what `_npu_flash_attention_v3` takes."""
    return tagged_nz(to_nz(compressed_additive(device)))


def hidden(mask: Tensor, left: int | None, right: int | None) -> Tensor:
    """bool, True: hidden, of a keep-mask (B | 1, H | 1, Sq, Sk) and a bottom-right aligned band."""
    found = ~mask
    rows, columns = mask.shape[-2:]
    offset = torch.arange(columns, device=mask.device) - torch.arange(rows, device=mask.device)[:, None]
    offset -= columns - rows
    if left is not None:
        found = found | (offset < -left)
    if right is not None:
        found = found | (offset > right)
    return found.contiguous()


def narrow_broadcast(mask: Tensor, *dims: int) -> Tensor:
    """``mask`` with one row of each dimension along which it was broadcast."""
    for dim in dims:
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def to_nz(rows: Tensor) -> Tensor:
    """(R, C) padded to multiples of 16 and cut into fractal columns: (1, C / 16, R, 16)."""
    r, c = (-(-n // NZ_BLOCK) * NZ_BLOCK for n in rows.shape)
    padded = torch.nn.functional.pad(rows, (0, c - rows.shape[1], 0, r - rows.shape[0]))
    return padded.view(1, r, c // NZ_BLOCK, NZ_BLOCK).transpose(1, 2).contiguous()


def tagged_nz(stored: Tensor) -> Tensor:
    """``stored``, in NZ's order of bytes, with CANN's format tag FRACTAL_NZ where there are tags: on an NPU.

    ATB reads the tag of a mask and transposes one that says ND, which here would be the second time. A last
    dimension of 16 is one fractal column, so that the cast moves nothing. Caches need no tag.
    """
    if stored.device.type != "npu":
        return stored
    tagged: Tensor = torch.ops.npu.npu_format_cast(stored, FRACTAL_NZ)
    return tagged


def additive_rows(positions: Tensor, columns: int, left: int | None) -> Tensor:
    """float16 (T, columns): 0 where a query at ``positions`` sees the key of that index, -inf elsewhere."""
    key = torch.arange(columns, device=positions.device)
    unseen = key > positions[:, None]
    if left is not None:
        unseen |= key < positions[:, None] - left
    return torch.zeros(unseen.shape, dtype=torch.float16, device=positions.device).masked_fill_(
        unseen, -torch.inf
    )
