"""Builds what is compiled: `fastattn.native._kernels`, and in wheels the machine code of `cuda_volta`.

The native kernels are C++, compiled once per instruction set and chosen at run time; they need g++ (or
$CXX) and Python's headers, not torch. Everything else about the package is in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

SOURCES = Path("fastattn/native/src")
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-g0",
    "-Wall",
    "-Wextra",
]
# Kernels never throw: an exception could not leave an OpenMP region.
KERNEL_FLAGS = [*COMMON_FLAGS, "-fPIC", "-fno-exceptions", "-fno-rtti"]
# GCC 12 takes the undefined operands inside its own AVX-512 header for a mistake of the caller.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# name -> (machines, macro that selects the SIMD layer, compiler flags)
INSTRUCTION_SETS: dict[str, tuple[tuple[str, ...], str, list[str]]] = {
    "portable": ((), "", []),
    "neon": (("aarch64", "arm64"), "FASTATTN_SIMD_NEON", []),
    "avx2": (("x86_64", "AMD64"), "FASTATTN_SIMD_AVX2", ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        ("x86_64", "AMD64"),
        "FASTATTN_SIMD_AVX512",
        ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *QUIET],
    ),
}
INSTRUCTION_SETS["avx512_bf16"] = (
    *INSTRUCTION_SETS["avx512"][:2],
    [*INSTRUCTION_SETS["avx512"][2], "-mavx512bf16", "-mavx512vnni"],
)


def stop(problem: str, remedy: str) -> None:
    raise SystemExit(f"\nfastattn's native kernels cannot be built: {problem}\n  {remedy}\n")


def compiler() -> str:
    """The C++ compiler's command; stops with what to install when there is none."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command.split()[0]) is None:
        stop(
            f"the C++ compiler {command!r} was not found.",
            "Debian/Ubuntu: apt install g++    Fedora: dnf install gcc-c++    or set CXX to your compiler.",
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stop(
            f"Python's headers were not found ({header}).",
            f"Debian/Ubuntu: apt install python{version}-dev    Fedora: dnf install python{version}-devel",
        )
    return command


def accepts(command: str, flags: list[str]) -> bool:
    """Whether the compiler knows these flags (older ones lack AVX-512 BF16)."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { return 0; }\n")
        run = [*command.split(), *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(run, capture_output=True, check=False).returncode == 0


class BuildKernels(build_ext):
    """Compiles kernels.cpp once per instruction set, then links everything into one extension."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        if not self.force and not newer_group([*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name)):
            return
        command = compiler()
        os.environ.setdefault("CXX", command)
        if not accepts(command, COMMON_FLAGS):
            stop(f"{command!r} does not accept {' '.join(COMMON_FLAGS)}.", "Use g++ 9 or later.")
        machine = platform.machine()
        chosen = {
            name: (macro, flags)
            for name, (machines, macro, flags) in INSTRUCTION_SETS.items()
            if (not machines or machine in machines) and accepts(command, flags)
        }
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda item: self._compile_kernels(item[0], *item[1]), chosen.items()))
        ext.extra_objects = objects
        version = subprocess.run(
            [*command.split(), "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
        ext.define_macros = [
            *((f"FASTATTN_WITH_{name.upper()}", "1") for name in chosen),
            ("FASTATTN_COMPILER", f'"{version}"'),
            ("FASTATTN_FLAGS", f'"{" ".join(COMMON_FLAGS)}"'),
        ]
        ext.extra_compile_args = COMMON_FLAGS
        super().build_extension(ext)

    def _compile_kernels(self, name: str, macro: str, flags: list[str]) -> str:
        macros = [("FASTATTN_ISA", name)] + ([(macro, "1")] if macro else [])
        source, folder = str(SOURCES / "kernels.cpp"), str(Path(self.build_temp) / name)
        (built,) = self.compiler.object_filenames([source], output_dir=folder)
        inputs = ["setup.py", *map(str, SOURCES.glob("*.hpp")), source]
        if not self.force and not newer_group(inputs, built):
            return built
        self.compiler.compile(
            [source],
            output_dir=folder,
            macros=macros,
            extra_postargs=[*KERNEL_FLAGS, *flags],
        )
        self._check_isolation(name, built)
        return built

    def _check_isolation(self, name: str, built: str) -> None:
        """Every mergeable symbol must belong to the instruction set's own namespace."""
        if shutil.which("nm") is None:
            return
        lines = subprocess.run(["nm", "-C", built], capture_output=True, text=True, check=True).stdout
        mergeable = [line[19:] for line in lines.splitlines() if line[17:18] in ("u", "V", "W")]
        shared = [symbol for symbol in mergeable if f"fastattn::{name}::" not in symbol]
        if shared:
            stop(
                f"{built} shares symbols with other instruction sets: {shared}",
                "Keep kernels in their namespace.",
            )


class BuildPython(build_py):
    """Also compiles the kernels of cuda_volta into the wheel, where the building environment has NVRTC."""

    # Ends with what is missing, before anything is compiled.
    PROBE = """
import sys
from cuda_volta import catalog, nvrtc
try:
    nvrtc.nvrtc()
    catalog.variants()
except (ImportError, nvrtc.NvrtcMissing) as error:
    sys.exit(str(error).splitlines()[0])
"""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # first use compiles, and caches
        # Outside pip's isolated environment, which holds only what every build needs: NVRTC is optional.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        python = [sys.executable, "-W", "ignore"]
        command = [*python, "-c", self.PROBE]
        probe = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
        if probe.returncode:
            print(f"not compiling the Volta kernels into the wheel, first use will: {probe.stderr.strip()}")
            return
        for arch in ("sm_70", "sm_72", "sm_75"):
            folder = str(Path(self.build_lib) / "cuda_volta" / "cubins" / arch)
            command = [*python, "-m", "cuda_volta", "build", "--arch", arch, "--out", folder]
            subprocess.run(command, env=environment, check=True)


setup(
    ext_modules=[
        Pybind11Extension(
            "fastattn.native._kernels",
            sources=[str(f) for f in sorted(SOURCES.glob("*.cpp")) if f.name != "kernels.cpp"],
            depends=["setup.py", *map(str, sorted(SOURCES.glob("*")))],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
)
