"""xformers' attention kernels for sm_70, cut out of its public wheel, and how they are launched."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from cuda_volta.cache import Cache
from cuda_volta.sass import tools
from cuda_volta.sass.paths import PARAMETERS, Launch, Program
from cuda_volta.sass.simulate import Residency

from .volta_model import Kernel, functions

WHEEL = "xformers==0.0.23"
_TAGS = ("--python-version", "3.11", "--platform", "manylinux2014_x86_64", "--only-binary", ":all:")
_ELEMENT = "_C.47.sm_70.cubin"  # of xformers/_C.so: float16, Volta
THREADS = 128
SEQLEN, PROBLEMS = 1024, 256  # of the published timings: xformers pull request 387, V100, not causal


class Peer(NamedTuple):
    """One kernel and what its authors measured."""

    head_dim: int
    symbol: str  # part of the kernel's name
    block_q: int
    block_k: int
    shared_bytes: int  # of a block: three fit, by registers
    published: float  # TFLOP/s


PEERS = (
    Peer(64, "64x64_rf_sm70", 64, 64, 20480, 28.8),
    Peer(128, "32x128_rf_sm70", 32, 128, 26000, 33.4),
    Peer(256, "32x128_gmem_sm70", 32, 128, 26000, 23.9),
)


def cubin() -> bytes:
    """The machine code; fetches the wheel (213 MB) the first time and keeps what is needed of it (0.4 MB)."""
    return Cache("sass").fetch(f"{WHEEL}-{_ELEMENT}", _cut)


def _cut() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps", "--quiet", *_TAGS, "-d", name]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(folder.glob("xformers-*.whl"))) as wheel:
            library = wheel.extract("xformers/_C.so", folder)
        subprocess.run(
            [tools.find("cuobjdump"), "-arch", "sm_70", "-xelf", _ELEMENT, library],
            check=True, cwd=folder, capture_output=True,
        )  # fmt: skip
        return (folder / _ELEMENT).read_bytes()


def kernel(peer: Peer) -> Kernel:
    """A peer's kernel, ready for both models."""
    function = next(f for name, f in functions(cubin()).items() if peer.symbol in name)
    residency = Residency(THREADS // 32, function.registers, peer.shared_bytes)
    return Kernel(f"xformers {peer.symbol}", function, Program(function), residency, 0)


def launch(peer: Peer, seqlen: int = SEQLEN) -> Launch:
    """As xformers' benchmark launches it: self-attention without mask, `PROBLEMS` sequences of one head."""
    grid = (seqlen // peer.block_q, 1, PROBLEMS)
    return Launch(_parameters(peer.head_dim, seqlen), grid, (32, THREADS // 32, 1))


def _parameters(head_dim: int, seqlen: int) -> bytes:
    """``AttentionKernel::Params`` of kernel_forward.h; its fields' places follow from that struct."""
    data = bytearray(0x258 - PARAMETERS)

    def put(kind: str, value: float, *places: int) -> None:
        for place in places:
            struct.pack_into(f"<{kind}", data, place - PARAMETERS, value)

    # query, key, value; output and its accumulator: any distinct addresses
    for number, place in enumerate((0x160, 0x168, 0x170, 0x1A0, 0x1A8), 1):
        put("q", number << 32, place)
    put("f", head_dim**-0.5, 0x1BC)
    put("i", head_dim, 0x1C0, 0x1C4)  # of q and k; of v
    put("i", seqlen, 0x1C8, 0x1CC, 0x1D0)  # queries, keys, keys in all
    put("i", head_dim, 0x1D8, 0x1DC, 0x1E0, 0x1E8)  # row strides of q, k, v, output
    put("i", head_dim, 0x1EC, 0x1F0, 0x1F4)  # head strides
    put("q", seqlen * head_dim, 0x200, 0x208, 0x210)  # batch strides
    put("i", PROBLEMS, 0x220)
    put("i", 1, 0x224)  # heads
    return bytes(data)
