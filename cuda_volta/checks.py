"""What every wrapper asks of its tensors before it launches."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16


def expect_half(name: str, t: Tensor) -> None:
    """Raises ValueError unless ``t`` is float16 with unit stride in the last dimension."""
    if t.dtype != float16:
        hint = "; Volta has no bfloat16: convert with .half()" if t.dtype == bfloat16 else ""
        raise ValueError(f"{name}: {t.dtype}, expected torch.float16{hint}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: stride {t.stride(-1)} in the last dimension, expected 1")


def expect_device(like: Tensor, **tensors: Tensor | None) -> None:
    """Raises ValueError naming the first tensor that is elsewhere than ``like``."""
    for name, t in tensors.items():
        if t is not None and t.device != like.device:
            raise ValueError(f"{name}: on {t.device}, expected {like.device}")


def in_octets(*tensors: Tensor) -> bool:
    """Whether every row of every tensor can be read 16 bytes at a time, but for its tail."""
    for t in tensors:
        if t.data_ptr() % 16:
            return False
        size = t.element_size()
        for n, stride in zip(t.shape[:-1], t.stride(), strict=False):
            if n > 1 and stride * size % 16:
                return False
    return True
