"""How fast the linear kernel reads a weight, by the issue simulator: what its code is cut for."""

from __future__ import annotations

import pytest

from lib import volta_linear

from .sass_code import needs_cuda_12

pytestmark = [pytest.mark.toolchain, needs_cuda_12]


def test_sixteen_rows_of_4_bits_are_read_at_two_thirds_of_900_gb_a_second() -> None:
    d = volta_linear.measure(4, 16)
    assert d.instructions < 25
    assert 600 < min(d.gigabytes_per_s) <= max(d.gigabytes_per_s) < d.reachable
