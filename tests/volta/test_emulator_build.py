"""The emulator's builds: cached by content, safe under concurrent processes, clean under sanitizers."""

from __future__ import annotations

import shutil
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


def found_by_a_program(
    folder: Path, compiler: list[str], flags: list[str], runner: list[str]
) -> dict[str, str]:
    """What the emulator, built with these flags, says of each plant."""
    program = folder / "every_plant"
    include = [f"-I{path}" for path in (KERNELS, build.EMULATOR, SOURCE.parent)]
    sources = [SOURCE.with_name("every_plant.cpp"), *sorted(build.EMULATOR.glob("*.cpp"))]
    common = ["-std=c++17", "-DVOLTA_EMULATOR", "-w", "-pthread", *include, *map(str, sources)]
    subprocess.run(
        [*compiler, *common, *flags, "-o", str(program)], check=True, capture_output=True, text=True
    )
    run = subprocess.run([*runner, program], capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr
    found = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    return {PLANTS[int(number)]: text for number, text in found.items()}


def caught(found: dict[str, str]) -> set[str]:
    assert list(found) == PLANTS
    return {name for name, text in found.items() if text != "sound"}


@pytest.mark.toolchain
def test_the_emulator_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers see nothing, whatever the kernel did."""
    flags = [*build.host_flags(), "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-O1"]
    found = found_by_a_program(tmp_path, [*build.compiler()], flags, [])
    assert caught(found) == {*FAULTS, *FAULTS_OF_TWO_BLOCKS}


@pytest.mark.cross
def test_the_emulator_on_aarch64(tmp_path: Path) -> None:
    """Another processor's stacks and registers."""
    tools = [shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64")]
    if None in tools:
        pytest.skip("NOT TESTED on aarch64: apt install g++-aarch64-linux-gnu qemu-user")
    found = found_by_a_program(tmp_path, [str(tools[0])], ["-O2", "-static"], [str(tools[1])])
    assert caught(found) == {*FAULTS, *FAULTS_OF_TWO_BLOCKS}
