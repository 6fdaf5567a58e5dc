"""The NEON and portable attention kernels, compiled for aarch64 and run under qemu-user, against float64."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.spec import AttentionArgs

from ..api.cases import DTYPES, HEAD_DIMS, LAYOUTS, Case, assert_accurate, int32, random_case, torch_math

pytestmark = pytest.mark.cross

ROOT = Path(__file__).parents[2]
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.bool: 3}


@pytest.fixture(scope="module", params=["neon", "portable"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the kernels."""
    tools = [shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64")]
    if None in tools:
        pytest.skip("NOT TESTED on aarch64: apt install g++-aarch64-linux-gnu qemu-user")
    compiler, emulator = tools
    isa, program = request.param, tmp_path_factory.mktemp("runner") / request.param
    macros = [f"-DFASTATTN_ISA={isa}", *(["-DFASTATTN_SIMD_NEON"] if isa == "neon" else [])]
    flags = ["-std=c++17", "-O2", "-fopenmp", "-static", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    source = str(Path(__file__).with_name("attention_runner.cpp"))
    sources = f"-I{ROOT / 'fastattn/native/src'}"
    subprocess.run([compiler, *flags, *macros, sources, source, "-o", str(program)], check=True)
    return [emulator, str(program)]


def message(a: AttentionArgs) -> bytes:
    """One case: 64-bit integers, two float64, sizes of the results, then each tensor as length and bytes."""
    packed_q = a.cu_seqlens_q is not None
    packed_k = a.cu_seqlens_k is not None and a.block_table is None
    q, k, v = (t.contiguous() for t in (a.q, a.k, a.v))
    batch = a.cu_seqlens_q.numel() - 1 if a.cu_seqlens_q is not None else q.shape[0]
    left, right = a.bounds()
    mask = None if a.attn_mask is None else a.attn_mask.contiguous()
    queries, heads, v_dim = q.shape[-3], q.shape[-2], v.shape[-1]

    def strides(t: Tensor, packed: bool) -> list[int]:
        return [0 if packed else t.stride(0), t.stride(-3), t.stride(-2)]

    numbers = [
        *(DTYPE_CODES[q.dtype], batch, heads, k.shape[-2], q.shape[-1], v_dim),
        *(0 if packed_q else queries, 0 if packed_k or a.block_table is not None else k.shape[1]),
        *(
            0 if a.block_table is None else k.shape[1],
            -1 if left is None else left,
            -1 if right is None else right,
        ),
        *(*strides(q, packed_q), *strides(k, packed_k), *strides(v, packed_k)),
        *(0 if packed_q else queries * heads * v_dim, heads * v_dim, v_dim),
        *(0 if packed_q else heads * queries, queries),
        0 if a.block_table is None else a.block_table.shape[1],
        heads if a.alibi_slopes is not None and a.alibi_slopes.ndim == 2 else 0,
        *([0] * 5 if mask is None else [DTYPE_CODES[mask.dtype], *mask.stride()]),
    ]
    rows = q.numel() // q.shape[-1]
    parts = [np.array(numbers, np.int64).tobytes(), np.array([a.scale, a.softcap]).tobytes()]
    parts.append(np.array([rows * v_dim * q.element_size(), rows * 4], np.int64).tobytes())
    for t in (
        *(q, k, v, a.cu_seqlens_q, a.cu_seqlens_k if packed_k else None, a.seqused_k, a.cache_batch_idx),
        *(
            a.cache_leftpad,
            a.q_pos0,
            a.k_pos0,
            a.block_table,
            a.alibi_slopes,
            a.sinks,
            mask,
            a.k_scale,
            a.v_scale,
        ),
    ):
        data = b"" if t is None else t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts += [len(data).to_bytes(8, "little"), data]
    return b"".join(parts)


def check(runner: list[str], cases: list[Case]) -> None:
    """Asserts accuracy of every case; the runner alternates between one and two threads."""
    calls = [case._replace(options={**case.options, "return_lse": True}).args() for case in cases]
    done = subprocess.run(runner, input=b"".join(map(message, calls)), capture_output=True, check=True)
    results = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
    for case, a in zip(cases, calls, strict=True):
        exact, exact_lse = reference.attention(a)
        yardstick, yardstick_lse = torch_math(a)
        size, lse_size = exact.numel() * a.q.element_size(), exact_lse.numel() * 4
        out, lse, results = results.split([size, lse_size, results.numel() - size - lse_size])
        assert_accurate(
            out.clone().view(a.q.dtype).view(exact.shape), yardstick, exact, f"{runner[-1]} {case}"
        )
        lse = lse.clone().view(torch.float32).view(exact_lse.shape)
        assert_accurate(lse, yardstick_lse, exact_lse, f"{runner[-1]} lse {case}")
    assert results.numel() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(runner: list[str], layout: str) -> None:
    dims = random.Random(f"cross {layout}")  # noqa: S311
    check(
        runner,
        [
            random_case(seed, layout, dtype, dims.choice(HEAD_DIMS))
            for seed in range(2000, 2012)
            for dtype in DTYPES
        ],
    )


def test_long_caches_are_split_and_merged(runner: list[str]) -> None:
    cases = []
    for dtype in DTYPES:
        for group in (1, 3, 4):
            q, k, v = (torch.randn(2, n, h, 64).to(dtype) for n, h in ((1, 2 * group), (2100, 2), (2100, 2)))
            cases += [
                Case(q, k, v, {"cache_seqlens": int32([2100, 801]), "sinks": torch.randn(2 * group)})
            ] * 2
    check(runner, cases)
