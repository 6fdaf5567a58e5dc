"""Turing (sm_75): the same kernels on Volta's tensor-core instruction, with less shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuda_volta import runtime
from cuda_volta.decode import VARIANTS as DECODE
from cuda_volta.prefill import ANYTHING, PLAIN, PREFILL
from cuda_volta.sass import listing
from cuda_volta.variant import Variant

from .sass_code import needs_cuda_12

pytestmark = [pytest.mark.toolchain, needs_cuda_12]


@pytest.mark.parametrize(
    "variant", [PREFILL[64, PLAIN], PREFILL[160, ANYTHING], DECODE[0]], ids=lambda v: v.name
)
def test_it_compiles_to_volta_s_instruction(variant: Variant, tmp_path: Path) -> None:
    built = runtime.machine_code(variant, "sm_75")
    assert built.spill_bytes == built.stack_bytes == 0
    assert built.shared_bytes <= 64 << 10
    assert variant.threads * variant.min_blocks <= 1024
    assert ".target sm_75" in built.ptx
    file = tmp_path / "kernel.cubin"
    file.write_bytes(built.cubin)
    (function,) = listing.read(file).values()
    products = {i.opcode for i in function.instructions if "HMMA" in i.opcode}
    assert products
    assert all(name.startswith("HMMA.884.F32") for name in products), products
