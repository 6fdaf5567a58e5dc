"""What every wrapper asks of its tensors before it launches."""

from __future__ import annotations

from torch import Tensor, bfloat16, dtype, float16


def expect_half(name: str, t: Tensor) -> None:
    """Raises ValueError unless ``t`` is float16 with unit stride in the last dimension."""
    if t.dtype != float16:
        hint = "; Volta has no bfloat16: convert with .half()" if t.dtype == bfloat16 else ""
        raise ValueError(f"{name}: {t.dtype}, expected torch.float16{hint}")
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: stride {t.stride(-1)} in the last dimension, expected 1")


def expect(name: str, t: Tensor, shape: tuple[int, ...], *dtypes: dtype) -> None:
    """Raises ValueError naming what ``t`` is and should be (-1: any); rows of a matrix have unit stride."""
    fits = len(shape) == t.ndim and all(n in (m, -1) for m, n in zip(t.shape, shape, strict=True))
    if not fits or t.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise ValueError(f"{name}: {t.dtype} {tuple(t.shape)}, expected {wanted} {shape}")
    if t.ndim > 1 and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name}: last stride {t.stride(-1)}, expected 1")


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
