"""Machine code of prefill: what each variant needs of an SM, and loops that `test_sass_gate` leaves out."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cuda_volta import runtime
from cuda_volta.prefill import ANYTHING, HEAD_DIMS, PREFILL, VARIANTS
from cuda_volta.sass.paths import follow
from cuda_volta.variant import Variant
from lib.volta_cases import CASES, FOLLOWED
from lib.volta_model import compiled, functions, launched, shipped

from .sass_code import assert_tight, needs_cuda_12

pytestmark = [pytest.mark.toolchain, needs_cuda_12]

SM_REGISTERS, SM_SHARED_BYTES = 64 * 1024, 96 * 1024
CASE = {case.name: case for case in CASES}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_eight_warps_fit_on_an_sm_and_nothing_spills(variant: Variant) -> None:
    built = runtime.machine_code(variant, "sm_70")
    assert built.spill_bytes == 0
    assert built.stack_bytes == 0
    blocks = min(
        SM_REGISTERS // (-(-built.registers // 8) * 8 * variant.threads),
        SM_SHARED_BYTES // variant.shared_bytes,
    )
    assert blocks >= variant.min_blocks
    assert blocks * variant.threads // 32 >= 8


@pytest.mark.parametrize("head_dim", [96, 160, 192])
def test_main_loops_between_the_powers_of_two(head_dim: int) -> None:
    """As tight as at 64, 128 and 256; and small enough for the cache next to a sub-core."""
    for name in ("plain", "softcap", "alibi"):
        assert_tight(compiled(CASE[name], head_dim), plain=name == "plain")


def test_head_dim_32_is_bound_by_issue() -> None:
    """Seven instructions of softmax a score, eight of products: the tensor cores cannot be the bound."""
    found = compiled(CASE["plain"], 32)
    assert found.tally.cycles_per_kmac <= 8.7
    assert found.tally.instructions_per_hmma <= 2.25
    assert found.tally.local_accesses == 0


@pytest.mark.parametrize("case", ["plain", "softcap", "alibi"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rescaling_is_what_a_branch_jumps_over(head_dim: int, case: str) -> None:
    """`follow(once=True)` takes a forward branch on data from the second time on: here round the rescaling.

    Counted every time, a path is longer by that block alone: O's registers and a lane's sums, times factors.
    """
    one = launched(CASE[case], head_dim, FOLLOWED[0])
    kernel = shipped(one.variant)
    code = kernel.function.instructions
    last = kernel.residency.warps - 1
    once, always = (
        np.bincount(follow(kernel.program, one.launch, (1, 0, 0), last, once=o).indices, minlength=len(code))
        for o in (True, False)
    )
    (block,) = np.nonzero(once != always)
    assert set(once[block]) == {1}
    assert set(always[block]) == {max(always[block])}  # every tile that the warp computes
    bases = [code[i].base for i in block]
    wide = one.variant.threads == 256
    of_o, rows = head_dim // (2 if wide else 1), 2 if wide else 4
    assert bases.count("FMUL") == of_o + rows
    assert bases.count("MUFU") == rows  # their factors
    assert not {"HMMA", "BAR", "LDS", "STS", "LDG"} & set(bases)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if dict(v.defines)["FEATURES"] < ANYTHING])
def test_output_is_stored_in_whole_chunks(variant: Variant) -> None:
    """16 bytes a lane, 8 of a last column tile without a pair, and a word of lse a row: no sector twice."""
    code = functions(runtime.machine_code(variant, "sm_70").cubin)[variant.entry].instructions
    widths = Counter(item.opcode.split(".")[2] for item in code if item.base == "STG")
    wide = variant.threads == 256
    columns = variant.head_dim // (32 if wide else 16)
    expected = {"128": 4 * (columns // 2), "64": 4 * (columns % 2), "SYS": 2 if wide else 4}
    assert widths == Counter(expected)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_is_what_the_kernel_lays_out(head_dim: int) -> None:
    """One tile of K and of V, rows padded to 128 bytes, and the part of Q that registers do not hold."""
    for features in range(ANYTHING + 1):
        v = PREFILL[head_dim, features]
        macros = dict(v.defines)
        wide = v.threads == 256
        q_rows_of_warp = 16 if wide else 32
        steps = head_dim // (16 if wide else 8) - macros["HELD"]
        assert steps % macros["TRIP"] == 0
        q_bytes = v.threads // 32 * steps * 512
        assert v.threads // 32 * q_rows_of_warp == v.block_q
        assert v.shared_bytes == 2 * v.block_k * -(-2 * head_dim // 128) * 128 + q_bytes
