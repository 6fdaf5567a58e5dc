"""Compiles a variant for the host with g++, once per content of its sources."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_volta.variant import KERNELS, Variant

EMULATOR = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# Kernels are full of `#pragma unroll`, and of branches that a variant's macros leave empty.
KERNEL_FLAGS = [
    "-DVOLTA_EMULATOR",
    "-fno-exceptions",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Wno-unused-variable",
    "-Wno-unused-but-set-variable",
    "-Wno-unused-function",
]


class BuildError(RuntimeError):
    """g++ is missing or refused a source; the message holds what it said."""


def cache_folder() -> Path:
    """Where built libraries are kept: ``$XDG_CACHE_HOME/cuda_volta/emulator``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cuda_volta" / "emulator"


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler's command: ``$CXX`` or g++."""
    command = tuple(os.environ.get("CXX", "g++").split())
    if shutil.which(command[0]) is None:
        raise BuildError(
            f"the emulator needs a C++ compiler, {command[0]!r} was not found: install g++ or set CXX"
        )
    return command


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def host_flags() -> tuple[str, ...]:
    """Vector instructions and half conversions, where this processor has them."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return ()
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ()
    return tuple(f"-m{name}" for name in ("avx2", "fma", "f16c") if name in known)


def library(variant: Variant) -> Path:
    """The shared library of a variant, built if the cache lacks it."""
    source = KERNELS / variant.source
    defines = [f"-D{name}={value}" for name, value in variant.defines]
    headers = [*KERNELS.glob("*.cuh"), *source.parent.glob("*.cuh"), *EMULATOR.glob("*.[ch]pp")]
    key = _digest([str(source), variant.entry, *defines], [source, *sorted(set(headers))])
    path = cache_folder() / f"{variant.entry}-{key}.so"
    if not path.exists():
        text = f'#include "{source}"\n#include "entry.hpp"\nVOLTA_ENTRY({variant.entry})\n'
        include = [f"-I{KERNELS}", f"-I{EMULATOR}"]
        options = [
            *KERNEL_FLAGS,
            *defines,
            *include,
            "-shared",
            "-x",
            "c++",
            "-",
            "-x",
            "none",
            str(_runtime()),
        ]
        _compile([*options, "-pthread"], path, text)
    return path


def _runtime() -> Path:
    """The emulated machine as one object file, the same for all kernels."""
    sources = sorted(EMULATOR.glob("*.cpp"))
    path = cache_folder() / f"machine-{_digest([], [*sources, *sorted(EMULATOR.glob('*.hpp'))])}.o"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor() as pool:
            list(
                pool.map(
                    lambda pair: _compile(["-c", str(pair[0])], pair[1]), zip(sources, objects, strict=True)
                )
            )
        _compile(["-r", "-nostdlib", *map(str, objects)], path)
    return path


def _digest(words: list[str], files: list[Path]) -> str:
    """Names what a build depends on: 16 hexadecimal digits."""
    state = hashlib.sha256(repr([_compiler_version(), FLAGS, KERNEL_FLAGS, host_flags(), words]).encode())
    for file in files:
        content = file.read_bytes()
        state.update(f"{file.name} {len(content)} ".encode() + content)
    return state.hexdigest()[:16]


def _compile(options: list[str], path: Path, text: str = "") -> None:
    """Writes ``path`` whole or not at all, whatever other processes do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    os.close(handle)
    try:
        command = [*compiler(), *FLAGS, *host_flags(), *options, "-o", name]
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(f"{' '.join(command)}\n{run.stderr}")
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
