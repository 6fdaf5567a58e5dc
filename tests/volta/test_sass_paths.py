"""The paths of launches: what compiled kernels execute, against the same integers in Python."""

from __future__ import annotations

import functools
import math
import struct
import tempfile
from pathlib import Path as File

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_volta.sass.listing import Function
from cuda_volta.sass.paths import SKIPPED, Launch, Path, Program, follow

from .sass_code import assemble, compiled, needs_cuda_12, words

HEAD = '#include "primitives.cuh"\nusing namespace volta;\n'


def ran(function: Function, params: bytes, warp: int = 0, **launch: object) -> Path:
    """One warp's path through a launch of one block of 128 threads, unless said otherwise."""
    given_launch = Launch(params, (1, 1, 1), (128, 1, 1))._replace(**launch)
    return follow(Program(function), given_launch, (0, 0, 0), warp)


def count(function: Function, path: Path, base: str) -> int:
    """How often an opcode was issued with a lane to execute it."""
    at = [i for i, item in enumerate(function.instructions) if item.base == base]
    return int(np.isin(path.indices[path.costs != SKIPPED], at).sum())


# ------------------------------------------------------------------------------- code written by hand
def test_trip_counts_follow_the_parameters() -> None:
    function = assemble(
        "MOV R0, RZ",
        "FADD R9, R9, R9",  # not computed
        "IADD3 R0, R0, 0x3, RZ",
        "ISETP.GE.U32.AND P0, PT, R0, c[0x0][0x160], PT",
        "@!P0 BRA 1",
        "EXIT",
    )
    for limit in (1, 3, 4, 300):
        assert list(ran(function, words(limit)).indices) == [0] + [1, 2, 3, 4] * -(-limit // 3) + [5]


def test_diverged_lanes_run_both_ways_and_meet() -> None:
    function = assemble(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x160], PT",
        "BSSY B0, 7",
        "@P0 BRA 6",
        "MOV R1, 0x1",
        "BRA 6",
        "BSYNC B0",
        "BAR.SYNC 0x0",
        "EXIT",
    )
    assert list(ran(function, words(9)).indices).count(7) == 1
    assert list(ran(function, words(9)).indices).count(4) == 1
    assert list(ran(function, words(0)).indices) == [0, 1, 2, 3, 6, 7, 8]
    assert list(ran(function, words(32)).indices) == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_branch_on_unknown_data_falls_through_and_is_reported() -> None:
    function = assemble("LDG.E.SYS R0, [R2]", "ISETP.EQ.AND P0, PT, R0, RZ, PT", "@P0 BRA 4", "NOP", "EXIT")
    path = ran(function, b"")
    assert list(path.indices) == [0, 1, 2, 3, 4]
    assert path.guessed == {2 * 16}


def test_what_a_guessed_branch_jumps_over_may_count_once() -> None:
    """Forwards only: a loop whose end is not known must still end."""
    function = assemble(
        "LDG.E.SYS R0, [R2]",
        "ISETP.EQ.AND P0, PT, R0, RZ, PT",
        "MOV R1, RZ",
        "@P0 BRA 5",
        "NOP",
        "IADD3 R1, R1, 0x1, RZ",
        "ISETP.NE.AND P1, PT, R1, 0x3, PT",
        "@P1 BRA 3",
        "@P0 BRA 8",
        "EXIT",
    )
    program = Program(function)
    launch = Launch(b"", (1, 1, 1), (32, 1, 1))
    always, once = (list(follow(program, launch, (0, 0, 0), 0, once=o).indices) for o in (False, True))
    assert (always.count(3), always.count(4), always.count(8)) == (3, 3, 1)
    assert (once.count(3), once.count(4), once.count(8)) == (3, 1, 1)


def test_memory_that_the_launch_names_is_known() -> None:
    function = assemble(
        "MOV R2, c[0x0][0x160]",
        "MOV R3, c[0x0][0x164]",
        "LDG.E.SYS R0, [R2+0x8]",
        "ISETP.EQ.AND P0, PT, R0, 0x5, PT",
        "@P0 BRA 6",
        "NOP",
        "EXIT",
    )
    at = 3 << 33
    params = at.to_bytes(8, "little")
    assert 5 not in ran(function, params, memory=[(at, words(1, 2, 5))]).indices
    path = ran(function, params, memory=[(at, words(5, 5, 1))])
    assert 5 in path.indices
    assert not path.guessed


@pytest.mark.parametrize(("softcap", "falls"), [(0.0, True), (30.0, False), (math.nan, False)])
def test_a_branch_on_a_float_parameter(softcap: float, falls: bool) -> None:
    function = assemble("FSETP.NEU.AND P0, PT, RZ, c[0x0][0x160], PT", "@P0 BRA 3", "NOP", "EXIT")
    path = ran(function, struct.pack("<f", softcap))
    assert (2 in path.indices) == falls
    assert not path.guessed


def test_predicates_kept_in_a_register() -> None:
    function = assemble(
        "LDG.E.SYS R4, [R2]",
        "ISETP.EQ.AND P1, PT, R4, RZ, PT",  # unknown
        "ISETP.EQ.AND P5, PT, RZ, RZ, PT",
        "P2R R6, PR, RZ, 0x20",
        "ISETP.NE.AND P5, PT, RZ, RZ, PT",
        "R2P PR, R6, 0x20",
        "@P5 BRA 8",
        "NOP",
        "EXIT",
    )
    path = ran(function, b"")
    assert 7 not in path.indices
    assert not path.guessed


def test_diverged_lanes_alone_take_bra_div() -> None:
    apart = assemble(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x5, PT",
        "BSSY B0, 6",
        "@P0 BRA 6",
        "BRA.DIV 6",
        "NOP",
        "BSYNC B0",
        "EXIT",
    )
    assert 5 not in ran(apart, b"").indices
    together = assemble("BRA.DIV 2", "NOP", "EXIT")
    assert list(ran(together, b"").indices) == [0, 1, 2]


def test_a_path_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda_volta.sass.paths.launch._LONGEST", 1000)
    with pytest.raises(ValueError, match="longer than 1000 instructions"):
        ran(assemble("NOP", "BRA 0", "EXIT"), b"")


# ------------------------------------------------------------------------------------ compiled kernels
INTEGERS = (
    HEAD
    + """
struct Params { i32 a, b; u32 c, d; i64 e; };
extern "C" __global__ void kernel(Params p, u32* out) {
    const i32 warp = static_cast<i32>(warp_index());
    const i64 wide = p.e * p.a + (p.e >> 7);
    u32 trips = static_cast<u32>((p.a / p.b) ^ (p.a % p.b)) % 50 + p.c / p.d % 40 + (p.c % p.d) % 30;
    trips += static_cast<u32>(wide >> 33) % 20 + static_cast<u32>(max(p.a, p.b) & 7);
    trips += __popc(0) + ((p.c << (p.d & 15)) >> 27) + (wide > (static_cast<i64>(p.c) << 20) ? 5 : 0) + warp;
    trips += abs(p.b) % 11 + __byte_perm(p.c, p.d, 0x5140) % 13;
    for (u32 i = 0; i < trips; ++i) barrier();
    stg(out + trips, trips);
}
"""
)


def trips(a: int, b: int, c: int, d: int, e: int, warp: int) -> int:
    """`INTEGERS` in Python."""

    def u32(x: int) -> int:
        return x & 0xFFFFFFFF

    def i64(x: int) -> int:
        return (x + (1 << 63)) % (1 << 64) - (1 << 63)

    def quotient(x: int, y: int) -> int:
        return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)

    q = quotient(a, b)
    wide = i64(e * a + (e >> 7))
    total = u32(q ^ (a - q * b)) % 50 + c // d % 40 + (c % d) % 30
    total += u32(wide >> 33) % 20 + (max(a, b) & 7)
    total += (u32(c << (d & 15)) >> 27) + (5 if wide > c << 20 else 0) + warp
    permuted = (c & 0xFF) | (d & 0xFF) << 8 | (c >> 8 & 0xFF) << 16 | (d >> 8 & 0xFF) << 24
    return u32(total + abs(b) % 11 + permuted % 13)


@functools.cache
def integers() -> tuple[Function, Program]:
    with tempfile.TemporaryDirectory() as folder:
        _, function = compiled(File(folder), INTEGERS)
    return function, Program(function)


@pytest.mark.toolchain
@needs_cuda_12
@settings(deadline=None, max_examples=60)
@given(
    st.integers(-(2**31) + 1, 2**31 - 1),
    st.integers(-(2**31) + 1, 2**31 - 1).filter(bool),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(-(2**40), 2**40),
    st.integers(0, 3),
)
def test_integer_arithmetic(a: int, b: int, c: int, d: int, e: int, warp: int) -> None:
    function, program = integers()
    params = words(a, b, c, d, e, e >> 32) + (1 << 32).to_bytes(8, "little")
    path = follow(program, Launch(params, (1, 1, 1), (128, 1, 1)), (0, 0, 0), warp)
    expected = trips(a, b, c, d, e, warp)
    assert count(function, path, "BAR") == expected
    assert not path.guessed
    assert list(path.sectors) == [((1 << 32) + 4 * expected) // 32]


STRIDED = (
    HEAD
    + """
struct Params { float* y; u32 stride, chunk, lanes; };
extern "C" __global__ void kernel(Params p) {
    const u32 at = shared_base() + thread_index() * p.stride * 4;
    if (thread_index() < p.lanes) {
        if (p.chunk & 1) sts32(at, 0);
        if (p.chunk & 2) sts64(at, Word2{0, 0});
        if (p.chunk & 4) sts128(at, Word4{0, 0, 0, 0});
    }
    barrier();
    stg(p.y + block_x() * 1024 + thread_index() * p.stride, bits_float(lds32(4 * thread_index())));
}
"""
)


def conflicts(stride: int, chunk: int, lanes: int) -> int:
    """Wavefronts of a store by its rule: the words that the fullest bank delivers, phase by phase."""
    total = 0
    for phase in range(0, 32, 32 // chunk):
        banks: dict[int, set[int]] = {}
        for lane in range(phase, min(lanes, phase + 32 // chunk)):
            for word in range(lane * stride, lane * stride + chunk):
                banks.setdefault(word % 32, set()).add(word)
        total += max(map(len, banks.values()), default=0)
    return total


@pytest.mark.toolchain
@needs_cuda_12
def test_bank_conflicts_and_sectors(tmp_path: File) -> None:
    _, function = compiled(tmp_path, STRIDED)
    program = Program(function)
    stores = [i for i, item in enumerate(function.instructions) if item.base == "STS"]
    y = 7 << 32
    for stride, chunk, lanes in [
        (1, 1, 32), (2, 1, 32), (32, 1, 32), (33, 1, 32), (2, 2, 32), (4, 2, 31), (4, 4, 32), (8, 4, 32),
        (36, 4, 32), (4, 4, 9), (64, 4, 5),
    ]:  # fmt: skip
        params = y.to_bytes(8, "little") + words(stride, chunk, lanes)
        path = follow(program, Launch(params, (4, 1, 1), (128, 1, 1)), (3, 0, 0), 0)
        costs = path.costs[np.isin(path.indices, stores)]
        assert costs[costs > 0].tolist() == [conflicts(stride, chunk, lanes)]
        first = y + 4 * 3 * 1024
        touched = sorted({(first + 4 * stride * lane) // 32 for lane in range(32)})
        assert path.sectors.tolist() == touched
        assert path.touches.sum() == len(touched)
        assert math.gcd(stride, 32) >= max(costs) or chunk > 1


LANES = (
    HEAD
    + """
struct Params { u32 lane, offset; };
extern "C" __global__ void kernel(Params p) {
    u32 v = lane_index() * 3;
    v = shuffle(v, p.lane) + shuffle_xor(v, 4u) % 3;
    bool any = any_lane(lane_index() == p.offset);
    for (u32 i = 0; i < v; ++i) barrier();
    if (any) __threadfence();
}
"""
)


@pytest.mark.toolchain
@needs_cuda_12
@pytest.mark.parametrize(("lane", "offset"), [(0, 31), (5, 40), (31, 0)])
def test_shuffles_and_votes(tmp_path: File, lane: int, offset: int) -> None:
    _, function = compiled(tmp_path, LANES)
    path = ran(function, words(lane, offset))
    assert count(function, path, "BAR") == 3 * lane
    assert count(function, path, "MEMBAR") == (offset < 32)
    assert not path.guessed
