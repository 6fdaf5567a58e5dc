"""NVRTC, the build's folder and index, and every instantiation compiled for Volta."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from cuda_volta import build as build_module
from cuda_volta import catalog, nvrtc
from cuda_volta.__main__ import main
from cuda_volta.binary import Binary, binary, compile_binary, source_key
from cuda_volta.build import build, shipped
from cuda_volta.sass import tools
from cuda_volta.variant import KERNELS, Variant

from .kernels import AXPY, axpy

# The keys that the issue of this backend names; tools read them.
KEYS = {
    "cubin", "kernel", "op", "head_dim", "block_q", "block_k", "warps", "causal", "registers", "spill_bytes",
    "shared_bytes",
}  # fmt: skip


Test = TypeVar("Test", bound=Callable[..., None])


def _has_nvrtc() -> bool:
    try:
        nvrtc.nvrtc()
    except nvrtc.NvrtcMissing:
        return False
    return True


def needs_nvrtc(test: Test) -> Test:
    """Marks a test that compiles for a GPU."""
    return pytest.mark.toolchain(
        pytest.mark.skipif(not _has_nvrtc(), reason="NVRTC 12 is not installed")(test)
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg"


# ----------------------------------------------------------------------------------------------- compiler
@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_70", "sm_72", "sm_75"])
def test_one_compilation_gives_machine_code_ptx_and_resources(tmp_path: Path, arch: str) -> None:
    built = compile_binary(axpy(tmp_path), arch, nvrtc.nvrtc())
    assert built.cubin.startswith(b"\x7fELF")
    flags = int.from_bytes(built.cubin[48:52], "little")
    assert flags & 0xFF == int(arch[3:])  # e_flags of a cubin end in its architecture
    assert (".target sm_70" in built.ptx) == (arch == "sm_70"), "what newer GPUs run"
    assert bool(built.ptx) == (arch == "sm_70")
    assert 5 <= built.registers <= 32
    assert (built.stack_bytes, built.spill_bytes, built.shared_bytes) == (0, 0, 512)


SPILLING = """
#include "primitives.cuh"
struct Params { float* y; };
VOLTA_KERNEL(axpy, 1024, 2)(Params p) {
    __shared__ float reserved[100];
    float v[64];
    for (int i = 0; i < 64; ++i) v[i] = p.y[i * volta::thread_index()];
    volta::barrier();
    for (int k = 0; k < 64; ++k) for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 7) % 64] + v[(i * 5) % 64];
    reserved[threadIdx.x % 100] = v[3];
    volta::barrier();
    for (int i = 0; i < 64; ++i) p.y[i * volta::thread_index()] = v[i] + reserved[i];
}
"""


@needs_nvrtc
def test_spills_and_static_shared_memory_are_seen(tmp_path: Path) -> None:
    built = compile_binary(axpy(tmp_path, SPILLING, threads=1024), "sm_70", nvrtc.nvrtc())
    assert built.registers == 32  # all that 2048 threads leave
    assert built.spill_bytes >= 100
    assert built.stack_bytes > 0
    assert built.shared_bytes == 4 * 1024 + 400


@needs_nvrtc
def test_a_refused_source_says_where(tmp_path: Path) -> None:
    variant = axpy(tmp_path, AXPY.replace("ldg(p.x + i)", "ldg(p.z + i)"))
    with pytest.raises(
        nvrtc.CompileError, match=r'axpy.cu\(16\): error: class "AxpyParams" has no member "z"'
    ):
        compile_binary(variant, "sm_70", nvrtc.nvrtc())


@needs_nvrtc
def test_only_volta_is_built_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arch: 'sm_80', expected one of sm_70, sm_72, sm_75"):
        compile_binary(axpy(tmp_path), "sm_80", nvrtc.nvrtc())


FOREIGN_NVRTC = """
extern "C" {
int nvrtcVersion(int* major, int* minor) { *major = MAJOR, *minor = 1; return 0; }
int nvrtcGetNumSupportedArchs(int* n) { *n = 2; return 0; }
int nvrtcGetSupportedArchs(int* archs) { archs[0] = 75, archs[1] = 90; return 0; }
const char* nvrtcGetErrorString(int) { return "unknown"; }
}
"""


@pytest.fixture
def foreign_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A site-packages that holds libraries of NVRTC's interface which, like CUDA 13's, lack sm_70."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    (tmp_path / "n.cpp").write_text(FOREIGN_NVRTC)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    nvrtc.nvrtc.cache_clear()
    yield tmp_path
    nvrtc.nvrtc.cache_clear()


def _install(site: Path, wheel: str, major: int) -> Path:
    library = site / "nvidia" / wheel / "lib" / f"libnvrtc.so.{major}"
    library.parent.mkdir(parents=True)
    run = ["g++", "-shared", "-fPIC", f"-DMAJOR={major}", "-o", str(library), str(site / "n.cpp")]
    subprocess.run(run, check=True)
    return library


def _hide_loader_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves only absolute paths, in case the machine has a toolkit."""
    real = nvrtc.candidates
    monkeypatch.setattr(nvrtc, "candidates", lambda major: (p for p in real(major) if p.startswith("/")))


def test_cuda_13_alone_is_refused_by_name(foreign_nvrtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide_loader_paths(monkeypatch)
    library = _install(foreign_nvrtc, "cu13", 13)
    with pytest.raises(nvrtc.NvrtcMissing) as error:
        nvrtc.nvrtc()
    text = str(error.value)
    assert text.startswith(f"only NVRTC 13.1 was found ({library}), and CUDA 13 cannot target Volta")
    assert "pip install nvidia-cuda-nvrtc-cu12" in text


def test_no_compiler_says_what_to_install(foreign_nvrtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide_loader_paths(monkeypatch)
    with pytest.raises(nvrtc.NvrtcMissing, match=r"was not found: pip install nvidia-cuda-nvrtc-cu12"):
        nvrtc.nvrtc()


def test_what_was_wrong_with_each_candidate_is_said(
    foreign_nvrtc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hide_loader_paths(monkeypatch)
    library = _install(foreign_nvrtc, "cuda_nvrtc", 12)
    with pytest.raises(nvrtc.NvrtcMissing, match=re.escape(f"{library}: NVRTC 12.1 has no sm_70")):
        nvrtc.nvrtc()


def test_a_torn_compiler_is_said(foreign_nvrtc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide_loader_paths(monkeypatch)
    library = foreign_nvrtc / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"torn")
    with pytest.raises(nvrtc.NvrtcMissing, match=re.escape(f"{library}: {library}: file too short")):
        nvrtc.nvrtc()


# ------------------------------------------------------------------------------------------ cache and keys
@needs_nvrtc
def test_a_binary_is_compiled_once(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = binary(axpy(tmp_path), "sm_70")
    (entry,) = (f for f in (own_cache / "fastattn" / "volta-cubins").iterdir() if "lock" not in f.name)

    def never(*args: object) -> Binary:
        raise AssertionError("compiled again")

    monkeypatch.setattr("cuda_volta.binary.compile_binary", never)
    assert binary(axpy(tmp_path), "sm_70") == first
    entry.write_bytes(entry.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="compiled again"):
        binary(axpy(tmp_path), "sm_70")


def test_a_binary_survives_its_bytes() -> None:
    original = Binary(b"\x7fELF\n\x00{}", "ptx ä\n", 168, 8, 16, 49152)
    assert Binary.from_bytes(original.to_bytes()) == original


def test_the_key_follows_everything_that_shapes_the_code(tmp_path: Path) -> None:
    variant = axpy(tmp_path)
    (tmp_path / "other").mkdir()
    edited = axpy(tmp_path / "other", AXPY + "// more\n")
    others = [
        edited,
        variant._replace(defines=(("THREADS", 64),)),
        variant._replace(entry="other"),
        variant._replace(shared_bytes=1024),
    ]
    assert len({source_key(v) for v in (variant, *others)}) == 5
    assert source_key(variant._replace(head_dim=64)) == source_key(variant)


# ------------------------------------------------------------------------------------------------- folder
@needs_nvrtc
@pytest.mark.usefixtures("own_cache")
def test_a_folder_holds_cubins_ptx_and_an_index(tmp_path: Path) -> None:
    variants = [axpy(tmp_path)._replace(head_dim=64, block_q=128, block_k=32, causal=True)]
    variants.append(variants[0]._replace(defines=(("THREADS", 64),), threads=64, shared_bytes=256))
    heard: list[int] = []
    build(variants, "sm_70", tmp_path / "out" / "sm_70", 2, lambda count, *rest: heard.append(count))
    assert heard == [1, 2]
    index = json.loads((tmp_path / "out" / "sm_70" / "index.json").read_text())
    assert isinstance(index, list)
    first, second = index
    assert set(first) >= KEYS
    assert first["cubin"] == "axpy_threads128.cubin"
    assert (tmp_path / "out" / "sm_70" / first["cubin"]).read_bytes().startswith(b"\x7fELF")
    expected = {
        "kernel": "axpy", "op": "axpy", "head_dim": 64, "block_q": 128, "block_k": 32, "warps": 4,
        "causal": True, "spill_bytes": 0, "shared_bytes": 512, "threads": 128, "defines": {"THREADS": 128},
        "arch": "sm_70",
    }  # fmt: skip
    assert {name: first[name] for name in expected} == expected
    assert (second["warps"], second["shared_bytes"]) == (2, 256)
    for variant in variants:
        assert shipped(variant, "sm_70", tmp_path / "out") == binary(variant, "sm_70")
    assert shipped(variants[0], "sm_72", tmp_path / "out") is None
    assert shipped(variants[0]._replace(entry="edited"), "sm_70", tmp_path / "out") is None
    build_module._index.cache_clear()  # noqa: SLF001


@needs_nvrtc
@pytest.mark.usefixtures("own_cache")
def test_a_failed_build_leaves_no_index(tmp_path: Path) -> None:
    good = axpy(tmp_path)
    build([good], "sm_70", tmp_path / "out", 1)
    with pytest.raises(nvrtc.CompileError, match="THREADS"):
        build([good, good._replace(defines=())], "sm_70", tmp_path / "out", 1)
    assert not (tmp_path / "out" / "index.json").exists()


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong, message in (
        (["--arch", "sm_80"], "invalid choice: 'sm_80'"),
        (["--jobs", "0"], "argument --jobs: 0, expected at least 1"),
        (["--match", "nothing"], "argument --match: no variant for sm_70 has 'nothing' in its name"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["build", "--out", str(tmp_path), *wrong])
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ the real kernels
def test_the_catalog_is_complete_and_small() -> None:
    variants = catalog.variants()
    assert 0 < len(variants) <= 50  # building all of them stays within minutes
    sources = {v.source for v in variants}
    assert sources == {f.name for f in KERNELS.glob("*.cu")}
    for v in variants:
        assert v.threads % 32 == 0, v.name


@needs_nvrtc
def test_every_instantiation_fits_a_volta_sm(tmp_path: Path) -> None:
    """Compiles all of them (or takes them from the cache of a former run of the same sources)."""
    variants = catalog.variants()
    assert main(["build", "--arch", "sm_70", "--out", str(tmp_path), "--jobs", "2"]) == 0
    index = {entry["cubin"]: entry for entry in json.loads((tmp_path / "index.json").read_text())}
    assert len(index) == len(variants)
    for v in variants:
        entry = index[f"{v.name}.cubin"]
        assert entry["spill_bytes"] == 0, v.name
        assert entry["stack_bytes"] == 0, v.name
        assert entry["shared_bytes"] <= 96 * 1024, v.name
        _check_residency(v, entry["registers"], entry["shared_bytes"])
        _check_bounds(v, (tmp_path / entry["ptx"]).read_text())


def _has_ptxas() -> bool:
    try:
        tools.find("ptxas")
    except tools.ToolMissing:
        return False
    return True


@needs_nvrtc
@pytest.mark.skipif(not _has_ptxas(), reason="no ptxas of CUDA 12")
def test_the_ptx_is_code_for_newer_gpus_of_the_oldest_isa(tmp_path: Path) -> None:
    """One variant of each source: ptxas refuses what the ISA version that a file names does not have."""
    for variant in {v.source: v for v in catalog.variants()}.values():
        file = tmp_path / f"{variant.name}.ptx"
        file.write_text(binary(variant, "sm_70").ptx)
        assert "\n.version 8.0\n" in file.read_text()
        command = [tools.find("ptxas"), "-arch=sm_90", "-o", str(file.with_suffix(".cubin")), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{variant.name}: {done.stdout}{done.stderr}"


def _check_residency(v: Variant, registers: int, shared_bytes: int) -> None:
    """``min_blocks`` blocks find room on one SM: 64 K registers (8 at a time), 96 KB, 2048 threads."""
    assert v.min_blocks * v.threads * -(-registers // 8) * 8 <= 65536, v.name
    assert v.min_blocks * -(-shared_bytes // 256) * 256 <= 96 * 1024, v.name
    assert v.min_blocks * v.threads <= 2048, v.name


def _check_bounds(v: Variant, ptx: str) -> None:
    """The source was compiled for the block that the launch will use."""
    assert re.search(rf"\.entry {v.entry}\(", ptx), v.name
    assert re.search(rf"\.maxntid {v.threads}\b", ptx), v.name
    assert re.search(rf"\.minnctapersm {v.min_blocks}\b", ptx), v.name
