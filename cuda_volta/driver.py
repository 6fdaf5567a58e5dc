"""The CUDA driver: loads cubins or PTX into torch's context and launches kernels on torch's streams.

Called through its C API (libcuda.so.1 comes with the driver). A launch neither synchronises nor allocates, so
a CUDA graph can capture it; loading may happen during a capture, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from .variant import Variant

OLDEST = 12000  # CUDA 12.0, as cuDriverGetVersion counts

# Of cuda.h.
_MAX_DYNAMIC_SHARED, _SHARED_CARVEOUT = 8, 9
_SHARED_PER_SM = 81  # attribute of a device
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_CAPTURE_RELAXED = 2
_INVALID_CONTEXT, _UNSUPPORTED_PTX = 201, 222


class DriverError(RuntimeError):
    """The driver is missing, too old, or refused a call."""


class Driver:
    """libcuda, initialised and new enough."""

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self.lib = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"no NVIDIA driver: {error}") from None
        self.call("cuInit", 0)
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.version_text = f"{version.value // 1000}.{version.value % 1000 // 10}"
        if version.value < OLDEST:
            raise DriverError(
                f"the NVIDIA driver supports CUDA {self.version_text}; the Volta kernels need CUDA 12.0: "
                "driver 525 or newer"
            )
        # Typed once, so that a launch passes plain integers.
        launch = self.lib.cuLaunchKernel
        launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]

    def call(self, name: str, *args: Any) -> None:
        """Calls a driver function. Raises DriverError with the driver's own words."""
        status = getattr(self.lib, name)(*args)
        if status:
            raise DriverError(f"{name}: {self.message(status)}")

    def message(self, status: int) -> str:
        """What a status means."""
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self.lib.cuGetErrorName(status, ctypes.byref(name))
        self.lib.cuGetErrorString(status, ctypes.byref(text))
        if name.value is None or text.value is None:
            return f"error {status}"
        return f"{name.value.decode()} ({status}): {text.value.decode()}"

    def attribute(self, index: int, name: int) -> int:
        """What ``cuDeviceGetAttribute`` says of a device."""
        device, value = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDeviceGetAttribute", ctypes.byref(value), name, device)
        return value.value

    def primary_context(self, index: int) -> ctypes.c_void_p:
        """The context of a device that torch uses, too; held as long as the process lives."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        return context

    @contextmanager
    def current(self, context: ctypes.c_void_p) -> Iterator[None]:
        """Inside, ``context`` is this thread's."""
        self.call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def load(self, image: bytes) -> ctypes.c_void_p:
        """A module of the current context, from a cubin or from PTX."""
        log = ctypes.create_string_buffer(1 << 14)
        keys = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        module, mode = ctypes.c_void_p(), ctypes.c_int(_CAPTURE_RELAXED)
        # A capture of this thread otherwise forbids what may allocate.
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            # The driver reads PTX up to its terminating zero.
            status = self.lib.cuModuleLoadDataEx(ctypes.byref(module), image + b"\0", 2, keys, values)
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        if status == _UNSUPPORTED_PTX:
            raise DriverError(
                f"the driver (CUDA {self.version_text}) is older than the PTX: {self.message(status)}; "
                "update it, or install an nvidia-cuda-nvrtc-cu12 of its CUDA version"
            )
        if status:
            raise DriverError(f"cuModuleLoadDataEx: {self.message(status)}\n{log.value.decode()}".rstrip())
        return module


@cache
def driver() -> Driver:
    """The driver of this machine. Raises DriverError where there is none, or too old a one."""
    return Driver()


class CudaKernel:
    """A variant loaded onto one device."""

    def __init__(self, variant: Variant, device: torch.device, image: bytes) -> None:
        self.variant = variant
        self._driver = driver()
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._context = self._driver.primary_context(self._index)
        with self._driver.current(self._context):
            module, function = self._driver.load(image), ctypes.c_void_p()
            name = ctypes.c_char_p(variant.entry.encode())
            self._driver.call("cuModuleGetFunction", ctypes.byref(function), module, name)
            if variant.shared_bytes > 48 * 1024:  # what a block gets without asking
                self._driver.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, variant.shared_bytes)
            of_sm = self._driver.attribute(self._index, _SHARED_PER_SM)
            percent = min(100, -(-100 * variant.min_blocks * variant.shared_bytes // of_sm))
            self._driver.call("cuFuncSetAttribute", function, _SHARED_CARVEOUT, percent)
        self._launch = launcher(self._driver.lib.cuLaunchKernel, function.value, variant)

    def launch(
        self,
        grid: tuple[int, int, int],
        params: ctypes.Structure,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        stream: int | None = None,
    ) -> None:
        """As `Kernel.launch`. A launch with no block does nothing. Raises DriverError."""
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.launch(grid, params, stream=stream)
        if stream is None:
            stream = torch.cuda.current_stream(self._index).cuda_stream
        status = self._launch(grid, params, stream)
        if status == _INVALID_CONTEXT:  # a thread that has made no CUDA call yet has none
            self._driver.call("cuCtxSetCurrent", self._context)
            status = self._launch(grid, params, stream)
        if status:
            raise DriverError(f"{self.variant.name}, grid {grid}: {self._driver.message(status)}")
        return None


def launcher(
    launch: Callable[..., int], function: int | None, variant: Variant
) -> Callable[[tuple[int, int, int], ctypes.Structure, int], int]:
    """What runs at every launch, all that can be prepared prepared: (grid, params, stream) -> status."""
    threads, shared = variant.threads, variant.shared_bytes
    pointer, addressof = ctypes.c_void_p * 1, ctypes.addressof

    def run(grid: tuple[int, int, int], params: ctypes.Structure, stream: int) -> int:
        x, y, z = grid
        if not x * y * z:
            return 0  # the driver would refuse it
        return launch(function, x, y, z, threads, 1, 1, shared, stream, pointer(addressof(params)), None)

    return run
