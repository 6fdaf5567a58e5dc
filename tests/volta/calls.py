"""fastattn's attention calls as the kernels' library takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cuda_volta.attention_params import AttentionCall
from fastattn.spec import AttentionArgs


def attention_call(a: AttentionArgs) -> AttentionCall:
    return AttentionCall(**{name: getattr(a, name) for name in AttentionCall._fields})


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
