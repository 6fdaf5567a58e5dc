"""Compiles a variant for the host with g++, once per content of its sources."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_volta.cache import Cache, digest
from cuda_volta.variant import KERNELS, Variant

EMULATOR = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
)
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
    options, text = _options(variant), _text(variant)

    def build() -> bytes:
        link = ["-shared", "-pthread", "-x", "c++", "-", "-x", "none", str(machine())]
        return compile_with([*options, *link], text)

    sources = {KERNELS / variant.source, EMULATOR / "entry.hpp", *EMULATOR.glob("*.cpp")}
    return _built.path(f"{variant.entry}-{_key([*options, text], sources)}.so", build)


def accepts(variant: Variant, text: str) -> None:
    """Raises BuildError if the compiler refuses ``text`` behind the variant's source; keeps nothing."""
    compile_with([*_options(variant), "-fsyntax-only", "-x", "c++", "-"], f"{_text(variant)}{text}\n")


def _options(variant: Variant) -> list[str]:
    defines = [f"-D{name}={value}" for name, value in variant.defines]
    return [*KERNEL_FLAGS, *defines, f"-I{KERNELS}", f"-I{EMULATOR}"]


def _text(variant: Variant) -> str:
    return f'#include "{KERNELS / variant.source}"\n#include "entry.hpp"\nVOLTA_ENTRY({variant.entry})\n'


def machine() -> Path:
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

    return _built.path(f"machine-{_key([], set(sources))}.o", build)


def _key(words: list[str], sources: set[Path]) -> str:
    """Names what a build depends on: compiler, options, and all files that the sources include."""
    command = [compiler_version(), *FLAGS, *host_flags(), *words]
    return digest(*command, *(f"{file.name}\n{text}" for file, text in sorted(_included(sources).items())))[
        :24
    ]


def _included(sources: set[Path]) -> dict[Path, str]:
    """The text of the files, and of those that they name in quotes, and so on."""
    texts: dict[Path, str] = {}
    waiting = {source.resolve() for source in sources}
    while waiting:
        file = waiting.pop()
        texts[file] = file.read_text()
        for name in re.findall(r'^#include "(.+)"', texts[file], re.MULTILINE):
            places = (folder / name for folder in (file.parent, KERNELS, EMULATOR))
            found = next((place.resolve() for place in places if place.exists()), None)
            if found is not None and found not in texts:
                waiting.add(found)
    return texts


def compile_with(options: list[str], text: str = "") -> bytes:
    """What the compiler makes of ``options``, reading ``text`` where they say ``-``; its output, if any."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        command = [*compiler(), *FLAGS, *host_flags(), *options, "-o", str(output)]
        plain = {**os.environ, "LC_ALL": "C"}  # messages in ASCII, whatever the user's language
        run = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=plain)
        if run.returncode:
            raise BuildError(f"{' '.join(command)}\n{run.stderr}")
        return output.read_bytes() if output.exists() else b""
