"""The emulator's builds: cached by content, safe under concurrent processes, clean under sanitizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cuda_volta.emulator import BuildError, build
from cuda_volta.variant import KERNELS, Variant

from .planted import PLANTS, SOURCE
from .test_emulator_checks import FAULTS, FAULTS_OF_TWO_BLOCKS

TINY = """
#include "primitives.cuh"
struct Params { unsigned* out; };
VOLTA_KERNEL(tiny, 32, 1)(Params p) { volta::stg(p.out + volta::thread_index(), volta::u32{VALUE}); }
"""

LAUNCH = """
import ctypes, sys, torch
from cuda_volta.emulator import load
from cuda_volta.variant import Variant

class Params(ctypes.Structure):
    _fields_ = (("out", ctypes.c_void_p),)

out = torch.zeros(32, dtype=torch.int32)
kernel = load(Variant("test", sys.argv[1], "tiny", (("VALUE", 7),), 32, 1, 0))
kernel.launch((1, 1, 1), Params(out.data_ptr()), writes=(out,))
print(int(out.sum()))
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The source of a kernel; the cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "tiny.cu"
    source.write_text(TINY)
    return source


def variant(source: Path, value: int = 7) -> Variant:
    return Variant("test", str(source), "tiny", (("VALUE", value),), 32, 1, 0)


@pytest.mark.toolchain
def test_processes_that_build_at_once(tiny: Path) -> None:
    command = [sys.executable, "-c", LAUNCH, str(tiny)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == [str(7 * 32)] * 3
    assert [process.returncode for process in running] == [0] * 3


@pytest.mark.toolchain
def test_a_library_is_named_after_all_it_was_built_from(tiny: Path) -> None:
    first = build.library(variant(tiny))
    assert build.library(variant(tiny)) == first
    assert build.library(variant(tiny, 8)) != first
    unused, used = tiny.with_name("unused.cuh"), tiny.with_name("used.cuh")
    unused.write_text("// of another kernel\n")
    assert build.library(variant(tiny)) == first
    used.write_text("// nothing yet\n")
    tiny.write_text(f'#include "used.cuh"\n{TINY}')
    second = build.library(variant(tiny))
    used.write_text("// changed\n")
    assert len({first, second, build.library(variant(tiny))}) == 3


@pytest.mark.toolchain
def test_what_the_compiler_says_reaches_the_caller(tiny: Path) -> None:
    tiny.write_text(TINY.replace("stg", "not_a_primitive"))
    with pytest.raises(BuildError, match="not_a_primitive"):
        build.library(variant(tiny))


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(BuildError, match="'no-such-compiler' was not found: install g\\+\\+ or set CXX"):
        build.compiler.__wrapped__()


@pytest.mark.toolchain
def test_the_emulator_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers see nothing, whatever the kernel did."""
    program = tmp_path / "sanitized"
    folders = [f"-I{folder}" for folder in (KERNELS, build.EMULATOR, SOURCE.parent)]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1", "-pthread"]
    sources = [SOURCE.with_name("emulator_sanitized.cpp"), *sorted(build.EMULATOR.glob("*.cpp"))]
    flags = [*build.FLAGS, *build.host_flags(), "-DVOLTA_EMULATOR", "-w", *sanitizers, *folders]
    command = [*build.compiler(), *flags, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    found = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    caught = {PLANTS[int(number)] for number, text in found.items() if text != "sound"}
    assert caught == {*FAULTS, *FAULTS_OF_TWO_BLOCKS}
