"""Where CUDA 12's binary tools are: sm_70 is gone from CUDA 13's."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path


class ToolMissing(RuntimeError):
    """No version of a binary tool that reads sm_70 is installed."""


@functools.cache
def find(tool: str) -> str:
    """The path of ``nvdisasm`` or ``cuobjdump``: of $NVDISASM or $CUOBJDUMP, Triton, or a CUDA 12 toolkit.

    Raises ToolMissing that lists what was found and how to get one.
    """
    refused = []
    for path in _candidates(tool):
        release = _release(path)
        if release is not None and release < 13:
            return path
        refused.append(f"{path} (release {release if release is not None else 'unknown'})")
    found = "; found " + ", ".join(refused) if refused else ""
    raise ToolMissing(
        f"{tool}: none that reads sm_70, which CUDA 13 dropped{found}. Install triton>=3.0,<3.7, whose wheel "
        f"brings CUDA 12's, or a CUDA 12 toolkit, or set ${tool.upper()} to one"
    )


def _candidates(tool: str) -> Iterator[str]:
    """Existing files, the preferred first."""
    named = os.environ.get(tool.upper())
    if named:
        yield named
        return
    wheel = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin" / tool
    if wheel.is_file():
        yield str(wheel)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (toolkit := Path(home) / "bin" / tool).is_file():
            yield str(toolkit)
    if on_path := shutil.which(tool):
        yield on_path


def _release(path: str) -> int | None:
    """CUDA's major version of a tool; None if it does not say."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"release (\d+)\.", said)
    return int(found[1]) if found else None
