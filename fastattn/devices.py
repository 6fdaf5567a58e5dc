"""The device that computes, as the user names it."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def device_named(device: str | torch.device) -> torch.device:
    """The device of this name; nothing is allocated. Raises ValueError when torch does not know it."""
    try:
        if str(device).partition(":")[0] == "npu":
            _register_npu()
        return torch.device(device)
    except (RuntimeError, ImportError) as error:
        raise _refused(device, error) from None


def usable_device(device: str | torch.device) -> torch.device:
    """`device_named`, and torch sees one: a tensor can be made there. Raises ValueError when not."""
    found = device_named(device)
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this kind
        raise _refused(device, error) from None
    return found


def _register_npu() -> None:
    """torch loads torch_npu by itself from 2.5 on."""
    if find_spec("torch_npu") is None:
        raise ImportError("torch_npu is not installed (pip install fastattn[ascend])")
    import torch_npu  # noqa: F401


def _refused(device: object, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"device: {str(device)!r}, expected one that torch sees: {reason}")
