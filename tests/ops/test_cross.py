"""The NEON kernels, compiled for aarch64 and run under qemu-user, against float64."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastattn import reference_ops
from fastattn.backends import torch_ops
from fastattn.spec import LinearArgs, RmsNormArgs, RotaryArgs, SwigluArgs

from .runners import FLOATS, assert_accurate, random
from .test_linear import FORMATS, weight
from .test_rotary_append import angles

pytestmark = pytest.mark.cross

ROOT = Path(__file__).parents[2]
CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
KINDS = {"dense": 0, "int8": 1, "int4": 2}
EMPTY = torch.empty(0)
Run = Callable[[list[int], list[Tensor]], Tensor]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))


@pytest.fixture(scope="module", params=["neon", "portable"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sends one case to the runner and returns its result as bytes (uint8)."""
    compiler, emulator = (shutil.which(f) for f in ("aarch64-linux-gnu-g++", "qemu-aarch64"))
    if compiler is None or emulator is None:
        pytest.skip("aarch64-linux-gnu-g++ and qemu-aarch64 are needed")
    isa = request.param
    program = tmp_path_factory.mktemp(isa) / "runner"
    flags = ["-std=c++17", "-O2", "-fopenmp", "-static", "-Wall", "-Wextra", "-Werror"]
    macros = [f"-DFASTATTN_ISA={isa}", *(["-DFASTATTN_SIMD_NEON"] if isa == "neon" else [])]
    include = f"-I{ROOT / 'fastattn/native/src'}"
    source = str(Path(__file__).with_name("cross_runner.cpp"))
    subprocess.run([compiler, *flags, *macros, include, source, "-o", str(program)], check=True)

    def send(numbers: list[int], blobs: list[Tensor]) -> Tensor:
        message = torch.tensor(numbers).numpy().tobytes()
        for blob in blobs:
            data = blob.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            message += len(data).to_bytes(8, "little") + data
        done = subprocess.run([emulator, str(program)], input=message, capture_output=True, check=True)
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)

    return send


@DTYPES
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_rms_norm(run, dtype, residual):
    x, w = random(5, 83, seed=1, dtype=dtype), random(83, seed=2)
    r = random(5, 83, seed=3, dtype=dtype) if residual else None
    ours = run([1, CODES[dtype], 0, 5, 83], [x, w, EMPTY if r is None else r]).view(dtype).view(5, 83)
    args = RmsNormArgs(x, w, 1e-5, r)
    assert_accurate(ours, torch_ops.rms_norm(args)[0], reference_ops.rms_norm(args)[0])


@DTYPES
def test_swiglu(run, dtype):
    x = random(7, 2 * 43, seed=4, dtype=dtype, scale=5)
    ours = run([2, CODES[dtype], 7, 43], [x]).view(dtype).view(7, 43)
    assert_accurate(ours, torch_ops.swiglu(SwigluArgs(x)), reference_ops.swiglu(SwigluArgs(x)))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rotary(run, dtype, interleaved):
    x = random(6, 3, 90, seed=5, dtype=dtype)
    cos, sin = angles(70)
    positions = torch.tensor([0, 49, 3, 3, 20, 7])
    numbers = [3, CODES[dtype], int(interleaved), 6, 3, 90, 35]
    ours = run(numbers, [x, cos, sin, positions]).view(dtype).view(6, 3, 90)
    args = RotaryArgs(x, cos, sin, positions, interleaved)
    assert_accurate(ours, torch_ops.rotary(args), reference_ops.rotary(args))


@DTYPES
@pytest.mark.parametrize("kind", [k for k in FORMATS if "bias" not in k and "x_perm" not in k])
@pytest.mark.parametrize(("op", "counts"), [(4, (1, 2, 15)), (5, (1, 6, 33))], ids=["few rows", "gemm"])
def test_linear(run, op, counts, kind, dtype):
    w = weight(kind, 37, 203)
    t = w.tensors
    for rows in counts:
        x = random(rows, w.shape[1], seed=rows, dtype=dtype)
        if w.format == "dense":
            facts = [CODES[t["weight"].dtype], 0, *w.shape, 0, 0, 0]
            blobs = [t["weight"], EMPTY, EMPTY, EMPTY]
        else:
            groups = t["scales"].shape[1]
            facts = [0, CODES[t["scales"].dtype], *w.shape, groups, w.group_size, w.group_offset]
            blobs = [t["codes"], t["scales"], t.get("mins", EMPTY), EMPTY if w.g_idx is None else w.g_idx]
        ours = run([op, CODES[dtype], rows, KINDS[w.format], *facts], [x, *blobs]).view(dtype).view(rows, 37)
        args = LinearArgs(x, w)
        assert_accurate(ours, torch_ops.linear(args), reference_ops.linear(args))
