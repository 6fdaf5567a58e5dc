"""Compiles a variant for the host with g++, once per content of its sources."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_volta.cache import Cache, digest
from cuda_volta.variant import KERNELS, Variant

EMULATOR = Path(__file__).parent
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra")
# NVRTC's pragmas; and what a variant's macros leave unused.
KERNEL_FLAGS = (
    "-DVOLTA_EMULATOR",
    "-fno-exceptions",
    "-Wno-unknown-pragmas",
    "-Wno-unused",
    "-Wno-unused-parameter",
)

_built = Cache("emulator")


class BuildError(RuntimeError):
    """g++ is missing or refused a source; the message holds what it said."""


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
def compiler_version() -> str:
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
    options = [*KERNEL_FLAGS, *(f"-D{name}={value}" for name, value in variant.defines)]
    options += [f"-I{KERNELS}", f"-I{EMULATOR}"]
    headers = [*KERNELS.glob("*.cuh"), *source.parent.glob("*.cuh"), *EMULATOR.glob("*.hpp")]
    text = f'#include "{source}"\n#include "entry.hpp"\nVOLTA_ENTRY({variant.entry})\n'

    def build() -> bytes:
        link = ["-shared", "-pthread", "-x", "c++", "-", "-x", "none", str(_machine())]
        return compile_with([*options, *link], text)

    key = _key([*options, text], [source, *headers, *EMULATOR.glob("*.cpp")])
    return _built.path(f"{variant.entry}-{key}.so", build)


def _machine() -> Path:
    """The emulated machine as one object file, the same for all kernels."""
    sources = sorted(EMULATOR.glob("*.cpp"))

    def build() -> bytes:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            for file, content in zip(
                objects, pool.map(lambda source: compile_with(["-c", str(source)]), sources), strict=True
            ):
                file.write_bytes(content)
            return compile_with(["-r", "-nostdlib", *map(str, objects)])

    return _built.path(f"machine-{_key([], [*sources, *EMULATOR.glob('*.hpp')])}.o", build)


def _key(words: list[str], files: list[Path]) -> str:
    """Names what a build depends on."""
    command = [compiler_version(), *FLAGS, *host_flags(), *words]
    contents = [file.name.encode() + b"\n" + file.read_bytes() for file in sorted(set(files))]
    return digest(*command, *contents)[:24]


def compile_with(options: list[str], text: str = "") -> bytes:
    """What the compiler makes of ``options``, reading ``text`` where they say ``-``."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        command = [*compiler(), *FLAGS, *host_flags(), *options, "-o", str(output)]
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BuildError(f"{' '.join(command)}\n{run.stderr}")
        return output.read_bytes()
