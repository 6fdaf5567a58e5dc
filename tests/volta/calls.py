"""fastattn's attention calls as the kernels' library takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_volta.attention_params import AttentionCall
from fastattn.spec import AttentionArgs


def attention_call(a: AttentionArgs, device: torch.device | None = None) -> AttentionCall:
    """The call, its tensors on ``device``: with the strides and alignment that they have."""
    call = AttentionCall(**{name: getattr(a, name) for name in AttentionCall._fields})
    if device is None or device == a.q.device:
        return call
    return AttentionCall(*(_moved(x, device) if isinstance(x, torch.Tensor) else x for x in call))


def _moved(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return storage.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


class _NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, (  # noqa: SLF001
            "a tensor's value was read on the host"
        )
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Fails on `item`, `tolist`, `if tensor`: what would synchronise, and break a CUDA graph's capture."""
    with _NoHostReads():
        yield
