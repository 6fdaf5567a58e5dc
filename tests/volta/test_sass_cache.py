"""What L2 lacks of a launch, on blocks whose sectors are known."""

from __future__ import annotations

import numpy as np
import pytest

from cuda_volta.sass.paths import SKIPPED, Path
from cuda_volta.sass.simulate.cache import L2_BYTES, Traffic, traffic

from .sass_code import assemble


def warp(sectors: list[int], touches: list[int], costs: list[int]) -> Path:
    """A warp whose loads cost ``costs`` sectors."""
    indices = np.zeros(len(costs), np.int32)
    return Path(indices, np.array(costs, np.int16), np.array(sectors), np.array(touches), frozenset())


def test_traffic_of_two_neighbours() -> None:
    code = assemble("LDG.E.SYS R0, [R2]", "EXIT").instructions
    own = [warp([1, 2, 9], [1, 1, 2], [4, SKIPPED]), warp([3, 8], [1, 1], [2])]
    beside = [warp([1, 2, 3, 40], [1, 1, 1, 1], [4])]
    assert traffic(code, own, beside) == Traffic(32 * 6, 32 * 3, 32 * 2, 32 * 1)


def test_what_fits_is_missing_once() -> None:
    small = Traffic(asked=1000, shared=400, private=100, private_again=100)
    assert small.miss_share(resident=8, sharers=4) == pytest.approx((100 + 400 / 4) / 1000)


def test_what_does_not_fit_is_missing_again() -> None:
    large = Traffic(asked=10 * L2_BYTES, shared=0, private=L2_BYTES, private_again=L2_BYTES)
    assert large.miss_share(resident=4, sharers=4) == pytest.approx((1 + 9 * 0.75) / 10)


def test_a_stream_leaves_the_rest_in_place() -> None:
    stream = Traffic(asked=2 * L2_BYTES, shared=0, private=2 * L2_BYTES, private_again=0)
    assert stream.miss_share(resident=80, sharers=1) == 1.0


def test_a_launch_that_asks_for_nothing() -> None:
    assert Traffic(0, 0, 0, 0).miss_share(80, 1) == 0.0
