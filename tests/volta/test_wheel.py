"""What a wheel carries: machine code where NVRTC builds it; an editable install carries none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from .test_build import needs_nvrtc

pytestmark = pytest.mark.toolchain

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources, with the smallest module of kernels as the whole catalog."""
    folder = tmp_path / "tree"
    for package in ("fastattn", "cuda_volta", "ascend_ops"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
        )
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    catalog = folder / "cuda_volta" / "catalog.py"
    catalog.write_text(catalog.read_text().replace("MODULES = (", 'MODULES = ("gate",)\n_ALL = ('))
    return folder


def build_py(python: str, tree: Path, *more: str) -> tuple[str, Path]:
    """Runs the step that fills a wheel with Python files; returns what it said, and the filled folder."""
    built = tree / "built"
    command = [python, "-W", "ignore", "setup.py", "-q", "build_py", "--build-lib", str(built), *more]
    # As pip does for an isolated build: what a child finds must not come from the caller's path.
    environment = {**os.environ, "PYTHONPATH": str(tree / "nothing"), "XDG_CACHE_HOME": str(tree / "xdg")}
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, built


SHIPPED = """
from cuda_volta import binary, build, catalog
binary.compile_binary = None  # nothing may be compiled
for arch in ("sm_70", "sm_72", "sm_75"):
    for v in catalog.variants(arch):
        built = build.shipped(v, arch)
        assert built.cubin.startswith(b"\\x7fELF") and (".target sm_70" in built.ptx) == (arch == "sm_70")
        assert built.spill_bytes == 0 and built.registers
print(build.__file__)
"""


@needs_nvrtc
def test_a_wheel_carries_machine_code(tree: Path) -> None:
    out, built = build_py(sys.executable, tree)
    assert "[1/1] swiglu" in out
    for arch in ("sm_70", "sm_72", "sm_75"):
        names = sorted(f.name for f in (built / "cuda_volta" / "cubins" / arch).iterdir())
        assert names == ["index.json", "swiglu.cubin", *(["swiglu.ptx"] if arch == "sm_70" else [])]
        (entry,) = json.loads((built / "cuda_volta" / "cubins" / arch / "index.json").read_text())
        assert entry["arch"] == arch
    assert not (tree / "cuda_volta" / "cubins").exists()
    environment = {**os.environ, "PYTHONPATH": str(built)}
    command = [sys.executable, "-c", SHIPPED]
    said = subprocess.run(
        command, env=environment, cwd=built, capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == str(built / "cuda_volta" / "build.py")


def test_a_wheel_without_a_compiler_says_so(tree: Path) -> None:
    venv.create(tree / "bare", with_pip=False)
    libraries = next((tree / "bare").glob("lib/python*/site-packages"))
    site = Path(str(metadata.distribution("setuptools").locate_file("")))
    for path in site.iterdir():
        if path.name.startswith(("setuptools", "_distutils_hack", "pybind11")):
            (libraries / path.name).symlink_to(path)
    out, built = build_py(str(tree / "bare" / "bin" / "python"), tree)
    assert "not compiling the Volta kernels into the wheel, first use will: NVRTC 12, which" in out
    assert (built / "cuda_volta" / "kernels" / "primitives.cuh").is_file()
    assert not (built / "cuda_volta" / "cubins").exists()


EDITABLE = """
import sys
from setuptools.command.build_py import build_py
finalize = build_py.finalize_options
def in_editable_mode(self):
    finalize(self)
    self.editable_mode = True
build_py.finalize_options = in_editable_mode
sys.argv = ["setup.py", "-q", "build_py"]
import setup
"""


def test_an_editable_install_compiles_nothing(tree: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", EDITABLE]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kernels" not in done.stdout
    assert not list(tree.rglob("cubins"))
