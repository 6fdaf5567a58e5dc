"""Native code under the compiler's sanitizers, outside Python."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fastattn import native

pytestmark = pytest.mark.slow

SOURCES = Path(native.__file__).parent / "src"
MACROS = {
    "avx512_bf16": ["-DFASTATTN_SIMD_AVX512"],
    "avx512": ["-DFASTATTN_SIMD_AVX512", "-mno-avx512bf16"],
    "avx2": ["-DFASTATTN_SIMD_AVX2"],
    "neon": ["-DFASTATTN_SIMD_NEON"],
    "portable": [],
}


# GCC 12 takes the undefined operands inside its own AVX-512 header for a mistake of the caller.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]


@pytest.fixture
def compiler() -> list[str]:
    command = os.environ.get("CXX", "g++").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs the C++ compiler {command[0]!r}")
    return [*command, "-std=c++17", "-O1", "-g", "-fno-sanitize-recover=all", f"-I{SOURCES}"]


@pytest.mark.parametrize("isa", sorted({native.isa(), "portable"}))
def test_random_calls(isa: str, compiler: list[str], tmp_path: Path) -> None:
    """Attention: no access outside a tensor or the workspace, no undefined arithmetic, no wrong result."""
    target = [f"-DFASTATTN_ISA={isa}", *MACROS[isa], *([] if isa == "portable" else ["-march=native"])]
    program, source = tmp_path / "fuzz", Path(__file__).with_name("attention_fuzz.cpp")
    flags = ["-fopenmp", "-fsanitize=address,undefined", *WARNINGS, *target]
    subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program, "200"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_ranks_hand_over_what_they_share(sanitizer: str, compiler: list[str], tmp_path: Path) -> None:
    """Shared memory: no byte is read before its writer handed it over, or overwritten before all read it."""
    program, source = tmp_path / "race", Path(__file__).with_name("shared_memory_race.cpp")
    flags = ["-DFASTATTN_ISA=portable", "-pthread", f"-fsanitize={sanitizer}", *WARNINGS]
    subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
    for world in (2, 3):
        # ThreadSanitizer knows no address space as random as some kernels make it.
        command = ["setarch", platform.machine(), "-R", str(program), str(world), "400"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
