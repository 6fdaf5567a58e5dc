"""What identifies one compiled kernel, and what can launch it: the seam of build, driver and emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

KERNELS = Path(__file__).parent / "kernels"


class Variant(NamedTuple):
    """One instantiation of a kernel: a source, its entry point and the macros that shape it.

    ``defines`` are passed to the compiler as ``-DNAME=VALUE``, in this order; the entry point is
    ``extern "C"`` and takes one struct by value.
    """

    op: str  # "prefill", "decode", "combine", "append", "linear", ...
    source: str  # file in kernels/
    entry: str
    defines: tuple[tuple[str, int], ...]
    threads: int  # of a block
    min_blocks: int  # resident on one SM, for __launch_bounds__
    shared_bytes: int  # dynamic shared memory of a block
    head_dim: int = 0
    block_q: int = 0
    block_k: int = 0
    causal: bool = False

    @property
    def name(self) -> str:
        """Unique among all variants; names the cubin."""
        return "_".join([self.entry, *(f"{key.lower()}{value}" for key, value in self.defines)])


class Kernel(Protocol):
    """A loaded variant, ready to launch: on a GPU through the driver, on a CPU through the emulator."""

    variant: Variant

    def launch(
        self,
        grid: tuple[int, int, int],
        params: ctypes.Structure,
        *,
        reads: Sequence[torch.Tensor] = (),
        writes: Sequence[torch.Tensor] = (),
        stream: int | None = None,
    ) -> None:
        """Launches ``grid`` blocks. ``params`` holds raw pointers into ``reads`` and ``writes``.

        The caller keeps the tensors alive until the kernel has run. The emulator turns every access outside
        them into an error, and so every store outside ``writes`` (which may be read as well); the driver
        does not look at them. ``stream`` is a raw handle; None: torch's current stream of the device.
        """
        ...
