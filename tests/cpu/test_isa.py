"""The choice of instruction set, and the arithmetic of each: exact conversions, functions to a few ulp."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import native

ISAS = native.available_isas()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_best_is_chosen() -> None:
    assert ISAS[0] == "portable"
    clean = {name: value for name, value in os.environ.items() if name != "FASTATTN_CPU_ISA"}
    code = "from fastattn import native; print(native.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ISAS[-1]


@pytest.mark.parametrize("isa", ISAS)
def test_each_can_be_set(isa: str) -> None:
    native.set_isa(isa)
    assert native.isa() == isa


@pytest.mark.parametrize("isa", [pytest.param(n, marks=pytest.mark.slow) for n in ISAS[1:-1]] + [ISAS[0]])
def test_each_can_be_forced(isa: str) -> None:
    result = run("from fastattn import native; print(native.isa())", FASTATTN_CPU_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"isa='avx1024' cannot run here: expected one of \['portable'"):
        native.set_isa("avx1024")
    code = "import fastattn, torch; x = torch.ones(1, 1, 1, 8); fastattn.attention(x, x, x)"
    result = run(code, FASTATTN_CPU_ISA="avx1024")
    assert result.returncode == 1
    assert "FASTATTN_CPU_ISA='avx1024' cannot run here: expected one of" in result.stderr


def test_build_info() -> None:
    info = native.build_info()
    assert set(info) == {"compiler", "flags", "pybind11"}
    assert "-O3" in info["flags"]


def average(v: Tensor) -> Tensor:
    """The mean of each pair of values, by attention over two keys of equal score: (2, n) -> (n,)."""
    n = v.shape[1]
    q, k = torch.zeros(1, 1, 1, 1, dtype=v.dtype), torch.zeros(1, 2, 1, 1, dtype=v.dtype)
    return fastattn.attention(q, k, v.view(1, 2, 1, n), backend="cpu").view(n)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 12], ids=["decode", "prefill"])
def test_conversions_are_exact(isa: str, dtype: torch.dtype, rows: int) -> None:
    """Every 16-bit pattern through one key of weight 1: infinities, subnormals and NaN included."""
    native.set_isa(isa)
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    if isa == "avx512_bf16" and dtype == torch.bfloat16:  # its dot product takes subnormals as zero
        values = values.masked_fill(values.abs() < torch.finfo(dtype).smallest_normal, 0.0)
    q, k = torch.zeros(1, rows, 1, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    out = fastattn.attention(q, k, values.view(1, 1, 1, -1), backend="cpu")[0, -1, 0]
    nan = values.isnan()
    assert torch.equal(out.isnan(), nan)
    assert torch.equal(out[~nan], values[~nan])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_results_round_to_nearest_even(isa: str, dtype: torch.dtype) -> None:
    """Means of neighbours are ties; means of random pairs fall anywhere."""
    native.set_isa(isa)
    first = torch.arange(0x0400, 0x7B00, dtype=torch.int32)
    ties = torch.stack((first, first + 1)).to(torch.int16).view(dtype)
    pairs = torch.cat((ties, torch.randn(2, 5001).to(dtype)), 1)
    expected = (pairs[0].float() * 0.5 + pairs[1].float() * 0.5).to(dtype)
    assert torch.equal(average(pairs), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_exponential(isa: str) -> None:
    """Two keys of scores 0 and x, values 0 and 1: the result is the logistic function."""
    native.set_isa(isa)
    x = torch.cat((torch.linspace(-86, 86, 4001), torch.randn(2000)))
    q, k = torch.ones(x.numel(), 1, 1, 1), torch.zeros(x.numel(), 2, 1, 1)
    k[:, 1, 0, 0] = x
    v = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(x.numel(), 2, 1, 1)
    out = fastattn.attention(q, k, v, scale=1.0, backend="cpu").view(-1).double()
    exact = torch.sigmoid(x.double())
    # The argument's rounding in units of log2(e) enters the result as |x| * 2^-24.
    assert ((out - exact).abs() / exact <= (4 + x.abs().double()) * 2**-23).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cap", [1.0, 30.0])
def test_softcap(isa: str, cap: float) -> None:
    """One key: lse is the capped score itself, from the linear range of tanh to its plateau."""
    native.set_isa(isa)
    x = torch.cat(
        (torch.logspace(-30, 4, 3001), torch.linspace(0.6, 0.65, 500), torch.tensor([0.0, torch.inf]))
    )
    x = torch.cat((x, -x)) * cap
    q, k = torch.ones(x.numel(), 1, 1, 1), x.view(-1, 1, 1, 1)
    _, lse = fastattn.attention(q, k, k.clamp(-1, 1), scale=1.0, softcap=cap, return_lse=True, backend="cpu")
    exact = cap * torch.tanh(x.double() / cap)
    assert ((lse.view(-1).double() - exact).abs() <= 4 * 2**-24 * exact.abs()).all()


@pytest.mark.parametrize("isa", ISAS)
def test_nan_spreads_and_stays_in_its_row(isa: str) -> None:
    native.set_isa(isa)
    q, k, v = torch.randn(1, 9, 1, 8), torch.randn(1, 20, 1, 8), torch.randn(1, 20, 1, 8)
    q[0, 3, 0, 5] = torch.nan
    out = fastattn.attention(q, k, v, backend="cpu")
    assert out[0, 3].isnan().all()
    assert out[0, [0, 1, 2, 4, 5, 6, 7, 8]].isfinite().all()
