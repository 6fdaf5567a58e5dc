"""From a variant to a kernel that can be launched on a tensor's device."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import torch

from .binary import ARCHITECTURES, PTX_OF, SHARED_BYTES, Binary, binary
from .build import has_shipped, shipped
from .nvrtc import NvrtcMissing, nvrtc, version_text
from .variant import Kernel, Variant

_PTX_FROM = (8, 0)
_ptx_on_newer = False


def use_ptx(allowed: bool) -> None:
    """Whether GPUs from 8.0 on run the kernels, from PTX: for testing, not for speed. Process-wide."""
    global _ptx_on_newer  # noqa: PLW0603
    _ptx_on_newer = allowed


def against(device: torch.device) -> list[str]:
    """Why kernels cannot run on ``device``; empty when they can. Compiles nothing."""
    if device.type == "cpu":
        return emulator_reasons()
    if device.type != "cuda" or not torch.cuda.is_available():
        return ["torch sees no NVIDIA GPU"]
    capability = torch.cuda.get_device_capability(device)
    arch = _arch(capability)
    if arch is None:
        text = (
            f"compute capability {capability[0]}.{capability[1]}, the Volta kernels are for 7.0, 7.2 and 7.5"
        )
        return [f"{text} (newer GPUs can run their PTX, for testing)" if capability >= _PTX_FROM else text]
    from .driver import DriverError, driver

    try:
        driver()
        if not has_shipped(arch):
            nvrtc()
    except (DriverError, NvrtcMissing) as error:
        return [str(error)]
    return []


def emulator_reasons() -> list[str]:
    """Why kernels cannot be emulated on this machine's CPU."""
    from .emulator.build import BuildError, compiler

    try:
        compiler()
    except BuildError as error:
        return [str(error)]
    return []


def describe(device_type: str) -> dict[str, str]:
    """Where kernels for such a device come from, and what compiles and launches them."""
    if device_type == "cpu":
        from .emulator.build import compiler

        return {"kernels": f"emulated on the CPU, built by {' '.join(compiler())}"}
    from .driver import driver

    names = ", ".join(arch for arch in ARCHITECTURES if has_shipped(arch))
    facts = {"kernels": f"shipped for {names}" if names else "compiled at first use"}
    with suppress(NvrtcMissing):
        facts["NVRTC"] = f"{version_text(nvrtc())} ({nvrtc().path})"
    return facts | {
        "driver": f"CUDA {driver().version_text}",
        "PTX on newer GPUs": "yes" if _ptx_on_newer else "no",
    }


@cache
def load(variant: Variant, device: torch.device) -> Kernel:
    """The kernel on ``device``: of a GPU through the driver, on a CPU through the emulator.

    Machine code comes from the installed wheel, else from the cache on disk, else NVRTC compiles it. Raises
    NvrtcMissing, CompileError, DriverError; ValueError for a device of another kind, or whose blocks have too
    little shared memory.
    """
    if device.type == "cpu":
        from . import emulator

        return emulator.load(variant)
    if reasons := against(device):
        raise ValueError(f"device: {device}: {'; '.join(reasons)}")
    from .driver import CudaKernel

    capability = torch.cuda.get_device_capability(device)
    arch = _arch(capability)
    assert arch is not None  # `against` saw to it
    if variant.shared_bytes > SHARED_BYTES[arch]:
        needs = f"{variant.shared_bytes >> 10} KB of shared memory, {arch} has {SHARED_BYTES[arch] >> 10}"
        raise ValueError(f"device: {device}: a block of {variant.name} needs {needs}")
    built = machine_code(variant, arch)
    native = arch == f"sm_{capability[0]}{capability[1]}"
    return CudaKernel(variant, device, built.cubin if native else built.ptx.encode())


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have on ``device``; a CPU's emulator stands for a V100."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return SHARED_BYTES[PTX_OF]
    return SHARED_BYTES[_arch(torch.cuda.get_device_capability(device)) or PTX_OF]


def machine_code(variant: Variant, arch: str) -> Binary:
    """The variant compiled for ``arch``: shipped, cached or compiled now."""
    return shipped(variant, arch) or binary(variant, arch)


def _arch(capability: tuple[int, int]) -> str | None:
    """What is built for a GPU of this compute capability; None: nothing."""
    native = f"sm_{capability[0]}{capability[1]}"
    if native in ARCHITECTURES:
        return native
    return PTX_OF if _ptx_on_newer and capability >= _PTX_FROM else None


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a CPU's emulator stands for a V100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 80
