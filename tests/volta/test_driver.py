"""Loading and launching: on a real GPU where there is one, else on a library of the driver's interface."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
import timeit
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cuda_volta import driver as driver_module
from cuda_volta import runtime
from cuda_volta.driver import CudaKernel, Driver, DriverError
from cuda_volta.variant import Kernel, Variant

from .kernels import AxpyParams, axpy


class StandIn:
    """The library of stand_in_cuda.cpp, which tells what the driver was asked to do."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.lib = ctypes.CDLL(self.path)
        self.lib.journal_text.restype = ctypes.c_char_p

    def told(self) -> list[str]:
        lines: list[str] = self.lib.journal_text().decode().splitlines()
        self.lib.journal_clear()
        return lines


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    source = Path(__file__).parent / "stand_in_cuda.cpp"
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def cuda(library: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn(library)
    found.lib.start_anew()
    monkeypatch.setattr(driver_module, "driver", lambda: Driver(found.path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0x50 + index))
    return found


def _params() -> AxpyParams:
    return AxpyParams(0x10, 0x20, 0.5, 7)


DEVICE = torch.device("cuda", 1)


def test_a_launch_passes_everything_on(cuda: StandIn, tmp_path: Path) -> None:
    kernel = CudaKernel(axpy(tmp_path), DEVICE, b"cubin")
    # min_blocks 2 of 512 bytes: 2 % of the SM's 96 KB must be shared memory.
    assert cuda.told() == ["retain 1", "capture mode 2", "capture mode 0", "function axpy", "attribute 9 = 2"]
    kernel.launch((3, 2, 1), _params())
    expected = "grid 3 2 1 block 128 1 1 shared 512 stream 0x51 x 0x10 y 0x20 a 0.5 n 7"
    assert cuda.told() == ["set current", f"launch 0x3000 {expected}"]
    kernel.launch((3, 2, 1), _params(), stream=0x99)
    assert cuda.told() == [f"launch 0x3000 {expected.replace('0x51', '0x99')}"]


def test_a_thread_without_a_context_gets_it(cuda: StandIn, tmp_path: Path) -> None:
    kernel = CudaKernel(axpy(tmp_path), DEVICE, b"cubin")
    cuda.lib.forget_context()
    cuda.told()
    thread = threading.Thread(target=kernel.launch, args=((1, 1, 1), _params()))
    thread.start()
    thread.join()
    first, second = cuda.told()
    assert first == "set current"
    assert second.startswith("launch")


def test_much_shared_memory_is_asked_for(cuda: StandIn, tmp_path: Path) -> None:
    CudaKernel(axpy(tmp_path, shared_bytes=48 * 1024), DEVICE, b"cubin")
    assert cuda.told()[-1] == "attribute 9 = 100"
    CudaKernel(axpy(tmp_path, shared_bytes=80 * 1024), DEVICE, b"cubin")
    assert cuda.told()[-2:] == ["attribute 8 = 81920", "attribute 9 = 100"]


def test_l1_gives_up_what_the_resident_blocks_need(cuda: StandIn, tmp_path: Path) -> None:
    """In percent of what the SM at hand has: Turing's 64 KB, where half would hold one block of two."""
    cuda.lib.set_shared_per_sm(64 << 10)
    CudaKernel(axpy(tmp_path, shared_bytes=24 * 1024), DEVICE, b"cubin")
    assert cuda.told()[-1] == "attribute 9 = 75"


def test_an_empty_grid_launches_nothing(cuda: StandIn, tmp_path: Path) -> None:
    kernel = CudaKernel(axpy(tmp_path), DEVICE, b"cubin")
    cuda.told()
    kernel.launch((0, 4, 1), _params())
    assert cuda.told() == []


@pytest.mark.parametrize(("version", "text"), [(11080, "11.8"), (11040, "11.4")])
def test_an_old_driver_is_refused(cuda: StandIn, version: int, text: str) -> None:
    cuda.lib.set_version(version)
    with pytest.raises(DriverError, match=rf"supports CUDA {text}; .* need CUDA 12.0: driver 525 or newer"):
        Driver(cuda.path)


def test_no_driver_is_said() -> None:
    with pytest.raises(DriverError, match=r"no NVIDIA driver: libnothere.so"):
        Driver("libnothere.so")


def test_the_drivers_words_are_passed_on(cuda: StandIn, tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"CUDA_ERROR_INVALID_PTX \(218\): a PTX .*\nptxas error: line 1"):
        CudaKernel(axpy(tmp_path), DEVICE, b"wrong")
    with pytest.raises(DriverError, match=r"driver \(CUDA 12.2\) is older than the PTX: error 222; update"):
        CudaKernel(axpy(tmp_path), DEVICE, b"newer")
    kernel = CudaKernel(axpy(tmp_path, threads=2048), DEVICE, b"cubin")
    refused = re.escape(
        "axpy_threads2048, grid (1, 1, 1): CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701): too many resources"
    )
    with pytest.raises(DriverError, match=refused):
        kernel.launch((1, 1, 1), _params())


def test_a_launch_costs_little_python(cuda: StandIn, tmp_path: Path) -> None:
    """Under 10 us: all of a launch but torch's own look-ups of device and stream, and the driver's work."""
    kernel = CudaKernel(axpy(tmp_path), DEVICE, b"cubin")
    params = _params()
    kernel.launch((1, 1, 1), params)
    kernel._launch = driver_module.launcher(_quiet(cuda), 0x3000, kernel.variant)  # noqa: SLF001
    seconds = min(timeit.repeat(lambda: kernel.launch((1, 1, 1), params), number=500, repeat=20)) / 500
    assert seconds < 10e-6


def _quiet(cuda: StandIn) -> ctypes._FuncPointer:  # type: ignore[name-defined]
    """A C function of cuLaunchKernel's signature that returns at once."""
    quiet = ctypes.CDLL(cuda.path).cuInit
    quiet.argtypes = Driver(cuda.path).lib.cuLaunchKernel.argtypes
    return quiet


# ------------------------------------------------------------------------------------------ a device at hand
def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU")
    return torch.device("cuda", torch.cuda.current_device())


def _axpy(kernel: Kernel, variant: Variant, x: torch.Tensor, y: torch.Tensor, a: float) -> None:
    params = AxpyParams(x.data_ptr(), y.data_ptr(), a, x.numel())
    blocks = -(-x.numel() // variant.threads)
    kernel.launch((blocks, 1, 1), params, reads=(x,), writes=(y,))


@pytest.mark.toolchain
def test_a_kernel_runs_in_the_emulator(tmp_path: Path) -> None:
    variant = axpy(tmp_path)
    x, y = torch.randn(1000), torch.randn(1000)
    expected = torch.addcmul(y, x, torch.tensor(0.5))
    _axpy(runtime.load(variant, x.device), variant, x, y, 0.5)
    torch.testing.assert_close(y, expected)


@pytest.mark.gpu
def test_a_kernel_runs_on_the_gpu_and_in_a_graph(tmp_path: Path) -> None:
    device, variant = _gpu(), axpy(tmp_path)
    runtime.use_ptx(True)
    x, y = torch.randn(1000, device=device), torch.randn(1000, device=device)
    expected, graph = y + 0.5 * x, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # loads during the capture, too
        _axpy(runtime.load(variant, device), variant, x, y, 0.5)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(y, expected + x)


def test_a_device_that_is_no_volta_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(
        ValueError, match=r"compute capability 9.0, the Volta kernels are for 7.0, 7.2 and 7.5"
    ):
        runtime.load(axpy(tmp_path), torch.device("cuda", 0))
    with pytest.raises(ValueError, match="device: meta: torch sees no NVIDIA GPU"):
        runtime.load(axpy(tmp_path), torch.device("meta"))
