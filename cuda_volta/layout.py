"""What is static about a tensor: launches are prepared from it once, and looked up afterwards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A tensor without its values and address; answers what is asked of tensors before a launch."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, t: Tensor) -> Layout:
        """The layout of ``t``."""
        return cls(t.shape, t.stride(), t.dtype, t.device)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def stride(self, dim: int | None = None) -> int | tuple[int, ...]:
        """As `Tensor.stride`."""
        return self.strides if dim is None else self.strides[dim]

    def is_contiguous(self) -> bool:
        """As `Tensor.is_contiguous`."""
        step = 1
        for size, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if size == 0:
                return True
            if size > 1 and stride != step:
                return False
            step *= size
        return True
