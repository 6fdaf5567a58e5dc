"""Machine code written by hand, and kernels compiled for the tests of `cuda_volta.sass`."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cuda_volta import nvrtc
from cuda_volta.sass import listing, tools
from cuda_volta.sass.listing import BYTES, Control, Function, Instruction
from cuda_volta.variant import KERNELS
from lib.volta_model import Static
from volta_tilings import BOUNDS, CACHE_BYTES

NEXT = Control(1, False, None, None, 0, 0)  # may issue in the next cycle, waits for nothing


def _found() -> bool:
    try:
        nvrtc.nvrtc()
        tools.find("nvdisasm")
        tools.find("cuobjdump")
    except (nvrtc.NvrtcMissing, tools.ToolMissing):
        return False
    return True


needs_cuda_12 = pytest.mark.skipif(not _found(), reason="NVRTC 12, nvdisasm or cuobjdump is not installed")


def assert_tight(found: Static, plain: bool) -> None:
    """A prefill loop meets the bounds that tilings are chosen by, which are tighter of ``plain`` calls."""
    cycles, instructions = BOUNDS[not plain]
    assert found.tally.cycles_per_kmac <= cycles
    assert found.tally.instructions_per_hmma <= instructions
    assert found.tally.barriers <= 2
    assert found.tally.local_accesses == 0
    assert found.tally.loop_bytes <= 20 * 1024
    assert found.hot_bytes <= CACHE_BYTES


def assemble(*lines: str, control: Control = NEXT) -> Function:
    """A function from lines like "@!P0 BRA 2": a branch names the line it goes to."""
    code = []
    for index, line in enumerate(lines):
        guard, _, rest = line.rpartition("@")[2].partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        jumps = opcode.partition(".")[0] in ("BRA", "BSSY")
        target = int(operands.split(", ")[-1]) * BYTES if jumps else None
        texts = tuple(operands.split(", ")) if operands else ()
        code.append(Instruction(index * BYTES, guard, opcode, texts, control, target))
    return Function("by_hand", tuple(code), 32, 0)


def compiled(folder: Path, source: str) -> tuple[Path, Function]:
    """The cubin of a source with one kernel, and that kernel."""
    options = ["--gpu-architecture=sm_70", "-std=c++17", "-default-device", f"--include-path={KERNELS}"]
    file = folder / "kernel.cubin"
    file.write_bytes(nvrtc.nvrtc().compile(source, "kernel.cu", options).cubin)
    (function,) = listing.read(file).values()
    return file, function


def words(*values: int) -> bytes:
    """Parameters of 32 bits each."""
    return struct.pack(f"<{len(values)}I", *(v & 0xFFFFFFFF for v in values))
