"""Every check of the emulator catches the fault that it is for, and lets the same kernel pass without it."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from cuda_volta.emulator import EmulationError, blocks_may_collide

from .planted import PLANTS, SOURCE, Params, kernel, plant

REVERSED = torch.arange(63, -1, -1, dtype=torch.int32) * 3
SWAPPED = (torch.arange(64, dtype=torch.int32) ^ 1) * 3

FAULTS = {
    "MISSING_BARRIER": "race .* loads 4 bytes .* stored without a barrier|uninitialised shared memory",
    "MISSING_SECOND_BARRIER": "race .* 4 bytes at shared 0x[0-9a-f]+, which thread [0-9]+ (loaded|stored)",
    "STORE_AFTER_OTHERS_LOAD": "race .*thread 40 .* 4 bytes at shared 0x400, which thread [0-9]+ loaded",
    "TWO_WRITERS": "race .*thread 1 .* stores 4 bytes at shared 0x400, which thread 0 stored",
    "MISSING_WARP_BARRIER": "race|uninitialised",
    "SHUFFLE_FOR_A_BARRIER": r"race .* which thread [0-9]+ stored without a barrier",
    "WARP_BARRIER_FOR_A_BLOCK": "race|uninitialised",
    "SHARED_OVERRUN": r"shared memory out of bounds .*thread 63 .* 0x500; the block has \[0x400, 0x500\)",
    "SHARED_BELOW_BASE": r"shared memory out of bounds .* 0x0; the block has \[0x400, 0x500\)",
    "SHARED_MISALIGNED": "misaligned access .*thread 1 .* stores 8 bytes at shared 0x40c",
    "UNINITIALISED": "uninitialised shared memory .*thread 17 .* 0x444",
    "HALF_INITIALISED": "uninitialised shared memory",
    "GLOBAL_LOAD_OVERRUN": "global memory out of bounds .*thread 63 .* loads 4 bytes",
    "GLOBAL_STORE_OVERRUN": "global memory out of bounds .*thread 63 .* stores 4 bytes",
    "GLOBAL_STORE_TO_INPUT": "global memory out of bounds .* stores 4 bytes .* no tensor",
    "GLOBAL_MISALIGNED": "misaligned access .*thread 2 .* loads 16 bytes at global",
    "GLOBAL_NULL": "global memory out of bounds .* loads 4 bytes at global 0x0",
    "BARRIER_IN_BRANCH_OF_WARPS": r"barrier divergence .* the end of the kernel.* barrier\(\) at planted.cu",
    "BARRIER_IN_BRANCH_OF_LANES": r"divergence .*thread 16: .* the end of the kernel.* barrier\(\)",
    "TWO_BARRIERS": r"barrier divergence .* barrier\(\) at planted.cu:[0-9]+.* barrier\(\) at planted.cu",
    "EXIT_BEFORE_BARRIER": r"divergence .*thread 63: .* the end of the kernel.* barrier\(\)",
    "LANE_EXITS_BEFORE_SHUFFLE": "divergence .*the end of the kernel.* a shuffle",
    "SHUFFLE_IN_BRANCH": "divergence .*thread 1 .* a shuffle at planted.cu:[0-9]+.* a shuffle at planted.cu",
    "MMA_IN_BRANCH": "divergence .*thread 48: .* the end of the kernel.* an mma",
}
SOUND = {
    "CONTROL": REVERSED,
    "WARP_BARRIER": SWAPPED,
    "HALVES_OF_A_WORD": torch.tensor([t // 2 * 2 | (t // 2 * 2 + 1) << 16 for t in range(64)]).int(),
    "WARP_EXITS": torch.tensor([t ^ 1 if t < 32 else -1 for t in range(64)]).int(),
}
# On two blocks, each with 64 threads.
FAULTS_OF_TWO_BLOCKS = {
    "STALE_FROM_ANOTHER_BLOCK": r"uninitialised shared memory in block \(1, 0, 0\)",
    "TWO_BLOCKS_STORE": r"race in block \(1, 0, 0\).* stores .* of block 0 stored without a fence",
    "LOAD_FROM_ANOTHER_BLOCK": r"race in block \(1, 0, 0\).* loads .* of block 0 stored without a fence",
    "LAST_BLOCK_WITHOUT_FENCE": r"race in block \(1, 0, 0\).* loads .* of block 0 stored without a fence",
}


def test_every_plant_is_tested() -> None:
    assert set(PLANTS) == {*FAULTS, *SOUND, *FAULTS_OF_TWO_BLOCKS, "LAST_BLOCK_ADDS_UP"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str) -> None:
    with pytest.raises(EmulationError, match=f"(?s)^planted: ({FAULTS[name]})") as caught:
        plant(name)
    message = str(caught.value)
    assert "block (0, 0, 0), thread " in message
    if named := re.search(r"at planted.cu:([0-9]+)", message):
        assert 0 < int(named[1]) <= len(SOURCE.read_text().splitlines())


@pytest.mark.parametrize("name", SOUND)
def test_the_same_without_the_fault_passes(name: str) -> None:
    assert plant(name)[0].equal(SOUND[name])


@pytest.mark.parametrize("name", FAULTS_OF_TWO_BLOCKS)
def test_a_fault_between_blocks_is_caught(name: str) -> None:
    with pytest.raises(EmulationError, match=f"(?s)^planted: {FAULTS_OF_TWO_BLOCKS[name]}"):
        plant(name, blocks=2)


def test_collisions_of_blocks_can_be_allowed() -> None:
    with blocks_may_collide():
        assert plant("TWO_BLOCKS_STORE", blocks=2).shape == (4, 64)
        with pytest.raises(EmulationError, match="race"):
            plant("STORE_AFTER_OTHERS_LOAD")
    with pytest.raises(EmulationError, match="race"):
        plant("TWO_BLOCKS_STORE", blocks=2)


def test_blocks_may_meet_at_a_fence_and_an_atomic() -> None:
    assert plant("LAST_BLOCK_ADDS_UP", blocks=4)[-1].tolist() == [1 + 2 + 3 + 4] * 64
    assert plant("LAST_BLOCK_ADDS_UP", blocks=40, workers=3).shape == (80, 64)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_blocks_on_any_number_of_workers(workers: int) -> None:
    assert plant("CONTROL", blocks=33, workers=workers)[:33].equal(REVERSED.expand(33, 64))


def test_a_failed_launch_leaves_nothing_behind() -> None:
    for name in FAULTS:
        with pytest.raises(EmulationError):
            plant(name)
        assert plant("CONTROL")[0].equal(REVERSED)


class Nested(ctypes.Structure):
    """``Nested`` of planted.cu."""

    _fields_ = (("first", ctypes.c_uint32), ("second", ctypes.c_uint32))


class NestedParams(ctypes.Structure):
    """``NestedParams`` of planted.cu."""

    _fields_ = (("out", ctypes.c_void_p), ("pair", Nested))


def test_params_are_compared_field_by_field() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    params = NestedParams(out.data_ptr(), Nested(40, 2))
    kernel("nested").launch((1, 1, 1), params, writes=(out,))
    assert out.item() == 42

    class Swapped(ctypes.Structure):
        _fields_ = (("second", ctypes.c_uint32), ("first", ctypes.c_uint32))

    class Wrong(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p), ("pair", Swapped))

    class Renamed(ctypes.Structure):
        _fields_ = (("output", ctypes.c_void_p), ("pair", Nested))

    class Short(ctypes.Structure):
        _fields_ = (("out", ctypes.c_void_p),)

    for mirror, fields in ((Wrong, "pair.first, pair.second"), (Renamed, "output"), (Short, "all of it")):
        with pytest.raises(
            ValueError, match=f"params: {mirror.__name__} is not the struct of nested: {fields}$"
        ):
            kernel("nested").launch((1, 1, 1), mirror())


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1, 1, -1), (2**31, 1, 1), (2**20, 2**13, 1)])
def test_grids_that_do_not_exist(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="grid: "):
        kernel("planted", 64, 256).launch(grid, Params())


def test_streams_and_thread_counts_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="stream: 7"):
        kernel("planted", 64, 256).launch((1, 1, 1), Params(), stream=7)
    with pytest.raises(ValueError, match=r"variant.threads: 48"):
        kernel("planted", 48, 256)
