"""The pipe bound of loops counted by hand."""

from __future__ import annotations

import pytest

from cuda_volta.sass import pipes

from .sass_code import assemble

HMMA = "HMMA.884.F32.F32.STEP0 R0, R8.ROW, R10.COL, R0"


@pytest.mark.parametrize(
    ("line", "busy"),
    [
        (HMMA, ("tensor", 2)),
        ("MUFU.EX2 R0, R1", ("xu", 8)),
        ("F2F.F16.F32 R0, R1", ("xu", 8)),
        ("LDS.U.128 R0, [R8]", ("mio", 16)),
        ("LDS.U.64 R0, [R8]", ("mio", 8)),
        ("STS [R8], R0", ("mio", 4)),
        ("LDG.E.128.SYS R0, [R8]", ("mio", 16)),
        ("LDS.U.U16 R0, [R8]", ("mio", 4)),
        ("SHFL.BFLY PT, R0, R1, 0x1, 0x1f", ("mio", 4)),
        ("FFMA R0, R1, R2, R3", ("fma", 2)),
        ("HFMA2 R0, R1, R2, R3", ("fma", 2)),
        ("IMAD.MOV.U32 R0, RZ, RZ, R1", ("fma", 2)),
        ("LOP3.LUT R0, R1, R2, RZ, 0xc0, !PT", ("alu", 2)),
        ("FMNMX R0, R1, R2, PT", ("alu", 2)),
        ("BAR.SYNC 0x0", ("", 0)),
    ],
)
def test_rates(line: str, busy: tuple[str, int]) -> None:
    assert pipes.pipe(assemble(line).instructions[0]) == busy


def test_an_unrolled_loop_of_two_tiles() -> None:
    function = assemble(
        "MOV R20, RZ",
        *[HMMA] * 8,  # 1
        "LDS.U.128 R8, [R12]",
        "LDS.U.128 R8, [R13]",
        "MUFU.EX2 R4, R4",
        "FFMA R4, R4, R5, R6",
        "ISETP.GE.AND P0, PT, R20, R21, PT",
        "STL [R1], R4",
        "BAR.SYNC 0x0",
        "@!P0 BRA 1",
        "STS [R12], R4",
        "EXIT",
    )
    found = pipes.static_tally(function, 4 * pipes.MACS_PER_STEP)
    assert found is not None
    assert found.cycles == {"issue": 8, "tensor": 8, "mio": 18, "xu": 4, "fma": 1, "alu": 1}
    assert found.busiest == "mio"
    assert found.cycles_per_kmac == pytest.approx(1000 * 18 / 1024)
    assert found.instructions_per_hmma == 2
    assert found.barriers == 0.5
    assert found.local_accesses == 0.5
    assert found.loop_bytes == 16 * 16
    assert found.macs == 1024


def test_rolled_loops_share_what_a_tile_needs() -> None:
    function = assemble(
        "FADD R0, R0, R1",  # 0: the main loop's header
        *[HMMA] * 2,  # 1: the first product, straight
        *[HMMA, "LDS.U.64 R8, [R12]", "@P0 BRA 3"],  # 3
        *[HMMA, HMMA, "@P1 BRA 6"],  # 6
        "@P2 BRA 0",
        "EXIT",
    )
    found = pipes.static_tally(function, 10 * pipes.MACS_PER_STEP)
    assert found is not None
    # Of ten steps two are straight; each loop gets four: four trips of the first, two of the second.
    assert found.counts == {"FADD": 1, "HMMA": 10, "LDS": 4, "BRA": 4 + 2 + 1}
    assert found.cycles == {"issue": 22, "fma": 2, "tensor": 20, "mio": 32}


def test_no_tensor_core_in_a_loop() -> None:
    assert pipes.static_tally(assemble(HMMA, "FADD R0, R0, R1", "@P0 BRA 1", "EXIT"), 1024.0) is None


def test_the_tensor_limit() -> None:
    function = assemble(*[HMMA] * 4, "@P0 BRA 0", "EXIT")
    found = pipes.static_tally(function, 4 * pipes.MACS_PER_STEP)
    assert found is not None
    assert found.busiest == "tensor"
    assert found.cycles_per_kmac == pytest.approx(7.8125)
