"""A call of one of torch_npu's operators, as data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Results = tuple[Tensor, Tensor | None]


class Invocation(NamedTuple):
    """``torch.ops.<namespace>.<name>(*args, **kwargs)``, and what makes our result of its outputs."""

    namespace: str  # "npu" or "atb"
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    finish: Callable[[Any], Any]

    def __call__(self) -> Any:
        operator = getattr(getattr(torch.ops, self.namespace), self.name)
        return self.finish(operator(*self.args, **self.kwargs))
