"""The device that computes, as the user names it."""

from __future__ import annotations

from collections.abc import Sequence
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
    """`device_named`, and torch can compute there. Raises ValueError when not."""
    found = device_named(device)
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without this kind
        raise _refused(device, error) from None
    if found.type == "cuda" and (lack := lacks_code(found)):
        raise ValueError(f"device: {str(device)!r}: {lack}")
    return found


def lacks_code(gpu: torch.device) -> str:
    """Why torch's own operators cannot run on an NVIDIA GPU; "" when they can, and for AMD's.

    A build for CUDA 13 has none for Volta: it sees such a GPU all the same, and its first operator fails.
    """
    if torch.version.hip is not None:  # names its architectures otherwise: gfx90a
        return ""
    capability, built_for = torch.cuda.get_device_capability(gpu), torch.cuda.get_arch_list()
    if not built_for or any(_runs(name, capability) for name in built_for):
        return ""
    return (
        f"torch {torch.__version__} has no code for compute capability {capability[0]}.{capability[1]}, only "
        f"{', '.join(built_for)}: install another build of torch"
    )


def _runs(built_for: str, capability: Sequence[int]) -> bool:
    """Code for sm_XY runs on X.Y to X.9; PTX, compute_XY, on everything from X.Y on."""
    kind, _, number = built_for.partition("_")
    digits = "".join(c for c in number if c.isdigit())  # sm_90a
    if kind not in ("sm", "compute") or not digits:
        return False
    major, minor = divmod(int(digits), 10)
    if kind == "compute":
        return (major, minor) <= tuple(capability)
    return major == capability[0] and minor <= capability[1]


def _register_npu() -> None:
    """torch loads torch_npu by itself from 2.5 on."""
    if find_spec("torch_npu") is None:
        raise ImportError("torch_npu is not installed (pip install fastattn[ascend])")
    import torch_npu  # noqa: F401


def _refused(device: object, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0]
    return ValueError(f"device: {str(device)!r}, expected one that torch sees: {reason}")
