"""The command ``fastattn info``: what runs on this machine, and why the rest does not."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .. import __version__, dispatch
from ..settings import Settings
from ..threads import OPENMP_VARIABLES, Machine, machine
from . import why
from .why import aligned

#: CPU features that the kernels, or torch's, make use of; as Linux names them.
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


class Row(NamedTuple):
    """One backend: usable here, or the reasons why not, and what it says of itself."""

    name: str
    usable: bool
    reasons: tuple[str, ...]
    details: Mapping[str, str]


def rows() -> list[Row]:
    """Every backend, in the order in which dispatch tries them."""
    found = []
    for name in dispatch.BACKENDS:
        reasons = dispatch.unavailable(name)
        details = {} if reasons else dict(dispatch.load_backend(name).describe())
        found.append(Row(name, not reasons, reasons, details))
    return found


def report() -> str:
    """The whole report: versions, machine, backends, environment variables in force."""
    here = machine()
    facts = {
        "fastattn": __version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cpu features": " ".join(cpu_features()) or "unknown",
        "usable": f"{here} (the machine has {os.cpu_count()} hardware threads)",
        "threads": _threads(here),
        "huge pages": f"transparent: {here.huge_pages or 'unknown'}",
        "openmp": ", ".join(openmp_runtimes()) or "none mapped",
    }
    lines = [*aligned(facts), "", "backends, in the order in which they are tried"]
    table = {}
    for row in rows():
        details = "; ".join(f"{name}: {text}" for name, text in row.details.items())
        table[row.name] = f"yes  {details}".rstrip() if row.usable else f"no   {'; '.join(row.reasons)}"
    lines += aligned(table, indent="  ")
    lines += ["", "environment"]
    variables = {
        name: f"{_in_force(name)}  {doc} ({accepted})" for name, accepted, doc in Settings.describe()
    }
    lines += aligned(variables | {name: _in_force(name) for name in OPENMP_VARIABLES}, "  ")
    return "\n".join(lines)


def _in_force(name: str) -> str:
    value = os.environ.get(name)
    return "(not set)" if value is None else repr(value)


def _threads(here: Machine) -> str:
    """What ops called from Python use, and what the command line takes."""
    now = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return f"{now} by OMP_NUM_THREADS, which fastattn generate obeys"
    text = f"{now} by torch.get_num_threads(); fastattn generate takes {here.threads} over its ranks here"
    if now > here.threads:
        text += "; more than can compute at once (torch.set_num_threads)"
    return text


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found[1] if found else ""


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The features of this CPU, among those that matter here."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in _FEATURES if name in present]


def openmp_runtimes() -> list[str]:
    """File names of the OpenMP runtimes mapped into this process; more than one is a fault."""
    path = Path("/proc/self/maps")
    text = path.read_text() if path.exists() else ""
    return sorted({Path(found).name for found in re.findall(r"/\S*lib(?:g|i|)omp\S*\.so\S*", text)})


# ------------------------------------------------------------------------------------------- command line
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fastattn info``."""
    parser.description = "What runs on this machine, and why the rest does not."
    parser.add_argument("--why", metavar="CALL", help=why.HELP)


def main(args: argparse.Namespace) -> int:
    """Prints the report, or the answer to ``--why``; returns the exit status."""
    print(report() if args.why is None else why.why(args.why))
    return 0
