"""The attention kernels under AddressSanitizer and UndefinedBehaviorSanitizer, outside Python."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("isa", sorted({native.isa(), "portable"}))
def test_random_calls(isa: str, tmp_path: Path) -> None:
    """No access outside a tensor or the workspace, no undefined arithmetic, no wrong result."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        pytest.skip(f"needs the C++ compiler {compiler!r}")
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    # GCC 12 takes the undefined operands inside its own AVX-512 header for a mistake of the caller.
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    target = [f"-DFASTATTN_ISA={isa}", *MACROS[isa], *([] if isa == "portable" else ["-march=native"])]
    program, source = tmp_path / "fuzz", Path(__file__).with_name("attention_fuzz.cpp")
    command = [*compiler.split(), "-std=c++17", "-O1", "-g", "-fopenmp", *sanitizers, *warnings, *target]
    subprocess.run([*command, f"-I{SOURCES}", str(source), "-o", str(program)], check=True)
    done = subprocess.run([program, "200"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
