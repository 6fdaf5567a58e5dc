"""Peak resident memory of this process."""

from __future__ import annotations

import resource
from pathlib import Path


def reset_peak() -> None:
    """Makes `peak_bytes` count from now, where the kernel allows it; elsewhere from the process's start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """The most resident memory since `reset_peak`, in bytes: weights, KV cache, torch itself, everything."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
