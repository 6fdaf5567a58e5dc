"""Tensors made once per device, and graphs: what a graph's capture makes lives in the graph's memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

T = TypeVar("T", bound=Callable[..., torch.Tensor])


def capturing(device: torch.device) -> bool:
    """Whether work for ``device`` is being captured into a graph."""
    return device.type == "npu" and getattr(torch, device.type).is_current_stream_capturing()


def made_once(most: int) -> Callable[[T], T]:
    """Keeps the last ``most`` tensors of a function of (*numbers, device), those of captures excepted.

    A capture takes what was made before it. What it makes itself is written on each replay and given away
    with the graph, so that a call outside must not find it.
    """

    def decorate(make: T) -> T:
        kept: dict[tuple[object, ...], torch.Tensor] = {}

        @wraps(make)
        def get(*key: object) -> torch.Tensor:
            found = kept.get(key)
            if found is None:
                found = make(*key)
                if not capturing(found.device):
                    while len(kept) >= most:
                        kept.pop(next(iter(kept)), None)
                    kept[key] = found
            return found

        return get  # type: ignore[return-value]

    return decorate
