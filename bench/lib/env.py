"""What a record says about the machine it was taken on."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import platform
import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

import torch

import fastattn
from fastattn.dispatch import load_backend, unavailable
from fastattn.threads import machine

ROOT = Path(__file__).resolve().parents[2]


def capture(threads: int) -> dict[str, str | int]:
    """Date, versions, processor and threads per rank."""
    device = accelerator()
    cpu = {} if unavailable("cpu") else dict(load_backend("cpu").describe())
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cores": cores(),
        "threads": threads,
        **({"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)} if on_gpu() else {}),
        **({"npu": device.get_device_name()} if device is not None and not on_gpu() else {}),
        **{f"cpu_{name}": value for name, value in cpu.items()},
    }


def headline(env: dict[str, str | int]) -> str:
    """One line for the terminal."""
    where = env.get("gpu") or env.get("npu") or f"{env['processor']}, {env['cores']} cores"
    return (
        f"{where} | fastattn {env['fastattn']} ({env['commit']}), "
        f"torch {env['torch']}, Python {env['python']}"
    )


def cores() -> int:
    """Threads that can compute at once."""
    return machine().threads


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


DEVICES = ("cpu", "cuda", "npu")


def use_device(name: str) -> None:
    """Makes a device that of tensors made from now on. Raises SystemExit where torch sees none."""
    # Not for "cpu": a default device, even that one, makes every call of torch pass through Python.
    if name != "cpu":
        check_device(name)
        torch.set_default_device(name)


def device(name: str) -> AbstractContextManager[object]:
    """`use_device` within a block."""
    check_device(name)
    return nullcontext() if name == "cpu" else torch.device(name)


def check_device(name: str) -> None:
    """Raises SystemExit where torch sees no such device."""
    if name == "npu" and importlib.util.find_spec("torch_npu"):
        importlib.import_module("torch_npu")  # which registers itself as torch.npu
    module = getattr(torch, name, None)
    if name != "cpu" and (module is None or not module.is_available()):
        raise SystemExit(f"--device {name}: torch sees none")


def accelerator() -> ModuleType | None:
    """torch.cuda or torch.npu, whichever drives the device of new tensors; None on a CPU."""
    kind = torch.get_default_device().type
    return None if kind == "cpu" else getattr(torch, kind)


def on_gpu() -> bool:
    """Whether tensors are made on a GPU."""
    return torch.get_default_device().type == "cuda"


def last_level_cache() -> int:
    """Bytes of the largest cache: the device's, or what the first processor sees.

    Where the system does not say, 32 MiB of a CPU and 192 MiB, which an Ascend 910B has, of an accelerator.
    """
    if (device := accelerator()) is not None:
        return int(getattr(device.get_device_properties(device.current_device()), "L2_cache_size", 192 << 20))
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def commit() -> str:
    """Short hash of the checkout, with "+" when files differ from it; "unknown" outside one."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*command: str) -> str:
    run = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.strip()
