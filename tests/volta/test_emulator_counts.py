"""Bank conflicts and global sectors, against a count from the rules in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_volta.emulator import Line

from .planted import SHARED_BYTES, one_access

SHARED = {0: 2, 1: 4, 2: 8, 3: 16}  # kind of planted.cu -> bytes a lane
GLOBAL = {4: 4, 5: 16, 6: 2}


def the_access(kind: int, addresses: list[int]) -> Line:
    """The line of the report that belongs to the access, not to the set-up."""
    name = {0: "shared store", 4: "global load", 5: "global load", 6: "global store"}.get(kind, "shared load")
    lines = [line for line in one_access(kind, addresses).lines if line.access == name]
    (line,) = [one for one in lines if one.requests == 1][-1:]
    assert line.bytes == 32 * {**SHARED, **GLOBAL}[kind]
    return line


def naive_wavefronts(width: int, addresses: list[int]) -> int:
    """32 banks of 4 bytes; 64-bit accesses in 2, 128-bit ones in 4 phases; equal words count once."""
    phases = np.array(addresses).reshape(max(1, width // 4), -1)
    total = 0
    for phase in phases:
        words = {(address + byte) // 4 for address in phase.tolist() for byte in range(0, width, 2)}
        total += max(np.bincount([word % 32 for word in words]))
    return total


@pytest.mark.parametrize("stride", range(17))
def test_strided_words_conflict_as_their_common_divisor(stride: int) -> None:
    line = the_access(1, [4 * stride * lane % SHARED_BYTES for lane in range(32)])
    assert line.wavefronts == (math.gcd(stride, 32) if stride else 1)
    assert line.conflicts == line.wavefronts - 1


@pytest.mark.parametrize(
    ("kind", "addresses", "wavefronts"),
    [
        pytest.param(3, [16 * lane for lane in range(32)], 4, id="128-bit in a row"),
        pytest.param(3, [64 * (lane % 32) for lane in range(32)], 16, id="128-bit, rows of 64 bytes"),
        pytest.param(3, [128 * (lane % 8) for lane in range(32)], 32, id="128-bit, one bank group"),
        pytest.param(3, [0] * 32, 4, id="128-bit broadcast"),
        pytest.param(2, [8 * lane for lane in range(32)], 2, id="64-bit in a row"),
        pytest.param(2, [64 * lane for lane in range(32)], 16, id="64-bit, two bank pairs"),
        pytest.param(0, [2 * lane for lane in range(32)], 1, id="halves of words"),
        pytest.param(
            0, [128 * (lane % 16) + lane // 16 * 2 for lane in range(32)], 16, id="halves of one bank"
        ),
    ],
)
def test_wavefronts(kind: int, addresses: list[int], wavefronts: int) -> None:
    assert the_access(kind, addresses).wavefronts == wavefronts == naive_wavefronts(SHARED[kind], addresses)


@settings(max_examples=60)
@given(st.data())
def test_wavefronts_of_any_addresses(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([1, 2, 3]))
    span = data.draw(st.sampled_from([4, 16, 64, SHARED_BYTES // SHARED[kind]]))
    units = data.draw(st.lists(st.integers(0, span - 1), min_size=32, max_size=32))
    addresses = [unit * SHARED[kind] % SHARED_BYTES for unit in units]
    assert the_access(kind, addresses).wavefronts == naive_wavefronts(SHARED[kind], addresses)


@settings(max_examples=40)
@given(st.sampled_from([4, 5]), st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_sectors_of_any_addresses(kind: int, units: list[int]) -> None:
    addresses = [unit * GLOBAL[kind] for unit in units]
    assert the_access(kind, addresses).sectors == len({address // 32 for address in addresses})


@pytest.mark.parametrize(
    ("kind", "stride", "sectors"), [(4, 4, 4), (4, 8, 8), (4, 32, 32), (6, 2, 2), (6, 4, 4)]
)
def test_sectors_of_strided_accesses(kind: int, stride: int, sectors: int) -> None:
    assert the_access(kind, [stride * lane for lane in range(32)]).sectors == sectors
