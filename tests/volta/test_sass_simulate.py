"""The issue simulator on code whose time is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cuda_volta.emulator.build import BuildError, compiler
from cuda_volta.sass.listing import Control, Function
from cuda_volta.sass.paths import Path
from cuda_volta.sass.simulate import Latency, Machine, Outcome, Residency, machine, run

from .sass_code import NEXT, assemble


def _has_compiler() -> bool:
    try:
        compiler()
    except BuildError:
        return False
    return True


pytestmark = [
    pytest.mark.toolchain,
    pytest.mark.skipif(not _has_compiler(), reason="needs a C++ compiler"),
]
HMMA = "HMMA.884.F32.F32.STEP0 R0, R8.ROW, R10.COL, R0"
IDEAL = Machine(l0_lines=0, branch_latency=0, launch_latency=0, barrier_latency=0, queue_latency=0)
TRIPS = 2000


def path(function: Function, order: Sequence[int], cost: int = 1) -> Path:
    """A warp that issues ``order``; each of its memory accesses costs ``cost``."""
    code = function.instructions
    memory = ("LDS", "STS", "LDG", "STG", "SHFL")
    costs = np.array([cost if code[i].base in memory else 0 for i in order], np.int16)
    nothing = np.zeros(0, np.int64)
    return Path(np.array(order, np.int32), costs, nothing, nothing, frozenset())


def looped(
    function: Function, warps: int, on: Machine = IDEAL, cost: int = 1, resident: int = 1, trips: int = TRIPS
) -> tuple[float, Outcome]:
    """(cycles a trip of the whole function as a loop, outcome) with ``warps`` a block."""
    last = len(function.instructions) - 1  # EXIT
    one = path(function, [*range(last)] * trips + [last], cost)
    outcome = run(function, [[one] * warps], [0] * (4 * resident), resident, on)
    return outcome.cycles_per_block / trips, outcome


@pytest.mark.parametrize("stall", [1, 4, 13])
def test_a_dependent_chain_takes_its_stall_counts(stall: int) -> None:
    function = assemble("FADD R0, R0, R1", "EXIT", control=NEXT._replace(stall=stall))
    cycles, _ = looped(function, 1)
    assert cycles == pytest.approx(max(2, stall), rel=1e-2)  # a warp occupies 16 lanes for two cycles


def test_two_warps_hide_each_others_stalls() -> None:
    function = assemble("FADD R0, R0, R1", "EXIT", control=NEXT._replace(stall=8))
    alone, _ = looped(function, 4)
    cycles, _ = looped(function, 16)  # four a sub-core
    assert (alone, cycles) == (pytest.approx(8, rel=1e-2), pytest.approx(8, rel=1e-2))
    crowded, _ = looped(function, 32)
    assert crowded == pytest.approx(16, rel=2e-2)


def test_independent_tensor_work_reaches_the_peak() -> None:
    function = assemble(HMMA, HMMA, HMMA, HMMA, "EXIT")
    cycles, outcome = looped(function, 8)
    assert cycles == pytest.approx(2 * 4 * 2, rel=1e-2)  # two warps a sub-core, four steps of two cycles
    assert outcome.tensor_share > 0.98
    flops_per_trip = 2 * 256 * 4 * 8
    speed = flops_per_trip / cycles * machine.CLOCK_HZ * machine.SMS
    assert speed == pytest.approx(125.3e12, rel=1e-2)


@pytest.mark.parametrize("wavefronts", [1, 4, 9])
def test_shared_memory_serves_one_wavefront_a_cycle_to_all_sub_cores(wavefronts: int) -> None:
    function = assemble("LDS.U.128 R0, [R8]", "EXIT")
    cycles, _ = looped(function, 8, cost=wavefronts)
    assert cycles == pytest.approx(8 * wavefronts, rel=2e-2)


def test_scoreboards_wait_for_a_load() -> None:
    load = Control(2, False, 0, None, 0, 0)
    use = NEXT._replace(wait=1)
    code = assemble("LDS.U R0, [R8]", "FADD R0, R0, R1", "EXIT").instructions
    function = Function("f", (code[0]._replace(control=load), code[1]._replace(control=use), code[2]), 32, 0)
    cycles, _ = looped(function, 1)
    # Served the cycle after its issue, used when its latency is over; the next load may go the cycle after.
    assert cycles == pytest.approx(1 + Latency().shared + 1, abs=1.01)
    many, _ = looped(function, 16)
    assert many == pytest.approx(cycles, rel=0.2)  # the same latency, hidden sixteen times


def test_a_barrier_waits_for_the_slowest_warp() -> None:
    function = assemble("FADD R0, R0, R1", "BAR.SYNC 0x0", "EXIT", control=NEXT._replace(stall=2))
    fast, slow = path(function, [1] * 100 + [2]), path(function, ([0] * 10 + [1]) * 100 + [2])
    outcome = run(function, [[fast, slow, fast, fast]], [0] * 4, 1, IDEAL._replace(barrier_latency=7))
    assert outcome.cycles_per_block / 100 == pytest.approx(10 * 2 + 7, rel=0.05)
    assert outcome.reasons["barrier"] > 0.5


def test_depbar_waits_for_its_scoreboard() -> None:
    loads = [Control(2, False, 3, None, 0, 0)] * 2
    lines = assemble("LDS.U R0, [R8]", "LDS.U R1, [R8]", "DEPBAR.LE SB3, 0x1", "FADD R0, R0, R2", "EXIT")
    plain = lines.instructions
    held = tuple(i._replace(control=c) for i, c in zip(plain, loads, strict=False)) + plain[2:]
    cycles, _ = looped(lines._replace(instructions=held), 1)
    # One of the two may be under way: the first one's latency counts.
    assert cycles == pytest.approx(Latency().shared + 3, abs=3.01)


def test_a_warp_that_can_never_issue_is_an_error() -> None:
    function = assemble("LDS.U R0, [R8]", "EXIT")
    with pytest.raises(ValueError, match="wait for each other"):
        run(function, [[path(function, [0, 1])]], [0, 0], 1, IDEAL._replace(mio_queue=0))


def test_a_loop_that_the_instruction_cache_holds_and_one_that_it_does_not() -> None:
    on = IDEAL._replace(l0_lines=96, fetch_latency=20, fetch_interval=0)
    lines = {}
    for size in (80, 120):
        function = assemble(*["FADD R0, R0, R1"] * (8 * size), "EXIT", control=NEXT._replace(stall=2))
        cycles, outcome = looped(function, 4, on, trips=20)
        lines[size] = (cycles - 2 * 8 * size) / size, outcome.fetched_lines
    extra, fetched = lines[80]
    assert extra < 2
    assert fetched <= 4 * 4 * 82  # once a block and sub-core
    extra, fetched = lines[120]
    assert 15 < extra < 25  # the latency of every line, on every trip
    assert fetched >= 4 * 4 * 20 * 119


def test_fetching_ahead_hides_the_latency() -> None:
    function = assemble(*["FADD R0, R0, R1"] * 960, "EXIT", control=NEXT._replace(stall=2))
    on = IDEAL._replace(l0_lines=96, fetch_latency=20, fetch_interval=0)
    behind, _ = looped(function, 4, on, trips=20)
    ahead, _ = looped(function, 4, on._replace(prefetch_lines=2), trips=20)
    assert ahead < 1.05 * 2 * 960 < 1.5 * 2 * 960 < behind


def test_memory_bandwidth_bounds_a_stream() -> None:
    load = Control(2, False, 0, None, 1, 0)
    function = assemble("LDG.E.128.SYS R0, [R8]", "EXIT", control=load)
    on = IDEAL._replace(miss_permille=1000)
    cycles, _ = looped(function, 32, on, cost=16, trips=200)
    a_sector = cycles / (32 * 16)
    assert a_sector == pytest.approx(on.memory_sector / 1000, rel=0.02)
    from_l2, _ = looped(function, 32, IDEAL, cost=16, trips=200)
    assert from_l2 / (32 * 16) == pytest.approx(IDEAL.l2_sector / 1000, rel=0.02)


def test_blocks_side_by_side_share_the_sm() -> None:
    function = assemble(HMMA, "FADD R0, R0, R1", "EXIT", control=NEXT._replace(stall=8))
    alone, _ = looped(function, 4)
    together, _ = looped(function, 4, resident=2)
    assert alone == pytest.approx(16, rel=1e-2)
    assert together == pytest.approx(8, rel=1e-2)  # two blocks in the time of one


@pytest.mark.parametrize(
    ("limits", "blocks"),
    [
        (Residency(4, 255, 40000), 2),
        (Residency(8, 255, 40000), 1),
        (Residency(4, 168, 20480), 3),
        (Residency(4, 32, 0), 16),
        (Residency(1, 16, 0), 32),
        (Residency(4, 32, 48 * 1024), 2),
        (Residency(4, 32, 96 * 1024), 1),
        (Residency(4, 32, 97 * 1024), 0),
    ],
)
def test_residency(limits: Residency, blocks: int) -> None:
    assert limits.blocks == blocks


def test_too_few_blocks_to_time() -> None:
    function = assemble("NOP", "EXIT")
    with pytest.raises(ValueError, match="kinds: 2 blocks, expected more than the 2 resident"):
        run(function, [[path(function, [0, 1])]], [0, 0], 2)
