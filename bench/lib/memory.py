"""Memory: this process's peak on the host or on an accelerator, and what torch alone takes."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType

_WITH_TORCH = "import torch; from lib.memory import resident_bytes; print(resident_bytes())"


def reset_peak(device: ModuleType | None = None) -> None:
    """Makes `peak_bytes` count from now, where the kernel allows it; elsewhere from the process's start."""
    if device is not None:
        device.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes(device: ModuleType | None = None) -> int:
    """The most memory since `reset_peak`, in bytes.

    What is resident: weights, KV cache, torch itself, everything; with ``device``, torch.cuda or torch.npu,
    what torch allocated there.
    """
    return _status("VmHWM") if device is None else int(device.max_memory_allocated())


def resident_bytes() -> int:
    """Resident memory now, in bytes."""
    return _status("VmRSS")


def with_torch_bytes() -> int:
    """Resident memory of a fresh interpreter that has imported torch and nothing else that is large."""
    folder = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _WITH_TORCH], cwd=folder, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def _status(field: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
