"""What a record says about the machine it was taken on."""

from __future__ import annotations

import datetime
import platform
import subprocess
from pathlib import Path

import torch

import fastattn
from fastattn.dispatch import load_backend, unavailable
from fastattn.threads import machine

ROOT = Path(__file__).resolve().parents[2]


def capture(threads: int) -> dict[str, str | int]:
    """Date, versions, processor and threads per rank."""
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
        **{f"cpu_{name}": value for name, value in cpu.items()},
    }


def headline(env: dict[str, str | int]) -> str:
    """One line for the terminal."""
    where = env.get("gpu", f"{env['processor']}, {env['cores']} cores")
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


def use_device(name: str) -> None:
    """Makes ``cuda``, or ``cpu``, the device of tensors made from now on. Raises SystemExit without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no NVIDIA GPU")
    torch.set_default_device(name)


def on_gpu() -> bool:
    """Whether tensors are made on a GPU."""
    return torch.get_default_device().type == "cuda"


def last_level_cache() -> int:
    """Bytes of the largest cache that the first processor sees; 32 MiB where the system does not say."""
    if on_gpu():
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
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
