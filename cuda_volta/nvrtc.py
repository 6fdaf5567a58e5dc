"""NVRTC, NVIDIA's run-time compiler: CUDA C++ source in, machine code and PTX out.

It needs no GPU, driver, toolkit or headers, only ``libnvrtc.so.12``: from the wheel nvidia-cuda-nvrtc-cu12
(torch's own builds for CUDA 12 bring it) or from an installed toolkit. Called through its C API, so that
no particular version of NVIDIA's Python bindings is asked for.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

_REMEDY = "pip install nvidia-cuda-nvrtc-cu12"


class NvrtcMissing(RuntimeError):
    """There is no NVRTC here that can compile for Volta; says what was found and what to install."""


class CompileError(RuntimeError):
    """The compiler refused a source; carries its messages."""


class Compiled(NamedTuple):
    """What one compilation gives."""

    cubin: bytes
    ptx: str
    log: str  # warnings, and with --ptxas-options=-v the resources of each kernel


class Nvrtc:
    """The library at ``path``, loaded. Safe to use from several threads and processes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lib = ctypes.CDLL(path)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[int]:
        """What it compiles for: 70 stands for sm_70."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return list(found)

    def compile(self, source: str, name: str, options: Sequence[str]) -> Compiled:
        """Compiles ``source`` for the one sm_* architecture that ``options`` name.

        ``name`` stands for the source in messages. Raises CompileError with all of them.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._lib.nvrtcCompileProgram(program, len(options), flags)
            log = self._output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                raise CompileError(f"{name}: {self._message(status)}\n{log}")
            ptx = self._output(program, "PTX").rstrip(b"\0").decode()
            return Compiled(self._output(program, "CUBIN"), ptx, log)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw

    def _call(self, name: str, *args: object) -> None:
        status = getattr(self._lib, name)(*args)
        if status:
            raise RuntimeError(f"{self.path}: {name}: {self._message(status)}")

    def _message(self, status: int) -> str:
        text: bytes = self._lib.nvrtcGetErrorString(status)
        return text.decode()


@cache
def nvrtc() -> Nvrtc:
    """The NVRTC of this environment that compiles for Volta. Raises NvrtcMissing, which says why not."""
    against = []
    for path in candidates(12):
        try:
            found = Nvrtc(path)
        except OSError as error:
            against.append(f"{path}: {error}")
            continue
        if 70 in found.architectures():
            return found
        against.append(f"{path}: NVRTC {version_text(found)} has no sm_70")
    for path in candidates(13):
        try:
            found = Nvrtc(path)
        except OSError:
            continue
        raise NvrtcMissing(
            f"only NVRTC {version_text(found)} was found ({path}), and CUDA 13 cannot target Volta: "
            f"CUDA 12.9 is the last that can; both may be installed side by side: {_REMEDY}"
        )
    found_text = "".join(f"\n  {line}" for line in against)
    raise NvrtcMissing(f"NVRTC 12, which compiles the kernels, was not found: {_REMEDY}{found_text}")


def version_text(lib: Nvrtc) -> str:
    """As in "12.9"."""
    return "{}.{}".format(*lib.version)


def candidates(major: int) -> Iterator[str]:
    """Paths of libnvrtc of a CUDA version, best first: wheels, toolkits, what the loader finds by itself."""
    library = f"libnvrtc.so.{major}"
    wheel = "cuda_nvrtc" if major < 13 else f"cu{major}"
    toolkits = [Path(os.environ[name]) / "lib64" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for folder in (*(Path(entry) / "nvidia" / wheel / "lib" for entry in sys.path), *toolkits):
        if (folder / library).is_file():
            yield str(folder / library)
    yield library
