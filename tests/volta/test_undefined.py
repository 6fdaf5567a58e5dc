"""The kernels do nothing that C++ leaves undefined: overflows, shifts too far, casts out of range."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cuda_volta import append, decode, gate, linear, norm, permute, prefill, rotary, weights
from cuda_volta.emulator import EmulatedKernel, build, record
from cuda_volta.variant import Variant
from tests.api.cases import LAYOUTS, random_case
from tests.ops.weights import make

from .calls import attention_call
from .planted import Params
from .weights import grouped

pytestmark = pytest.mark.toolchain

OVERFLOW = """
#include "primitives.cuh"
struct Params { unsigned* out; const unsigned* in; const unsigned* table; unsigned plant, bytes; };
VOLTA_KERNEL(overflow, 32, 1)(Params p) {
    const volta::i32 n = static_cast<volta::i32>(p.bytes);
    volta::stg(p.out + volta::thread_index(), static_cast<volta::u32>(n + n));
}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EmulatedKernel]:
    """Loads kernels that are built with the sanitizer, for the wrappers as well."""
    monkeypatch.setattr(build, "KERNEL_FLAGS", (*build.KERNEL_FLAGS, "-fsanitize=undefined", "-g1"))
    kernels: dict[Variant, EmulatedKernel] = {}

    def load(variant: Variant, device: torch.device | None = None) -> EmulatedKernel:
        if variant not in kernels:
            kernels[variant] = EmulatedKernel(variant, build.library(variant))
        return kernels[variant]

    for module in (append, decode, gate, linear, norm, permute, prefill, rotary, weights):
        monkeypatch.setattr(module, "load", load)
    return load


def test_an_overflow_is_noticed(
    tmp_path: Path, load: Callable[..., EmulatedKernel], capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "overflow.cu"
    source.write_text(OVERFLOW)
    out = torch.zeros(32, dtype=torch.int32)
    kernel = load(Variant("test", str(source), "overflow", (), 32, 1, 0))
    kernel.launch((1, 1, 1), Params(out.data_ptr(), 0, 0, 0, 2**31 - 1), writes=(out,))
    assert "overflow.cu:6" in (told := capfd.readouterr().err)
    assert "runtime error: signed integer overflow" in told


@pytest.mark.usefixtures("load")
@pytest.mark.parametrize("function", [prefill.prefill, decode.decode])
def test_attention(function: Callable[..., object], capfd: pytest.CaptureFixture[str]) -> None:
    for layout in LAYOUTS:
        for seed in range(5):
            head_dim = random.Random(f"{layout} {seed}").choice((40, 64))  # noqa: S311
            function(attention_call(random_case(seed, layout, torch.float16, head_dim).args()))
    call = attention_call(random_case(0, "dense", torch.float16, 64).args())
    decode.decode(call, splits=3)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("load")
def test_the_other_ops(capfd: pytest.CaptureFixture[str]) -> None:
    half = torch.float16
    for fmt in ("int4", "int8"):
        for options in ({}, {"g_idx": True, "x_perm": True}, {"group": 64, "offset": 32, "bias": half}):
            for rows in (1, 40):
                linear.linear(torch.randn(rows, 96).half(), grouped(make(fmt, 33, 96, **options)))
    with record() as reports:
        linear.linear(torch.randn(2, 1024).half(), grouped(make("int4", 33, 1024, bias=torch.float32)))
    assert [r.variant.entry for r in reports] == ["linear", "split_sum"]
    norm.rms_norm(torch.randn(3, 100).half(), torch.ones(100).half(), 1e-6)
    gate.swiglu(torch.randn(3, 70).half())
    cos, sin = torch.randn(9, 8), torch.randn(9, 8)
    positions = torch.tensor([0, 8, 3])
    rotary.rotary(torch.randn(3, 2, 20).half(), cos, sin, positions)
    cache, rows = torch.zeros(2, 2, 4, 2, 20).half(), torch.randn(3, 2, 20).half()
    slots = torch.tensor([5, -(1 << 62), (1 << 63) - 1])
    append.append_kv(cache[0], cache[1], rows, rows, slots, cos=cos, sin=sin, positions=positions)
    assert capfd.readouterr().err == ""
