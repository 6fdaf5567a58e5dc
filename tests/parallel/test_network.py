"""Ranks on two machines: they work, and notice when the cable between them is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.network import INTERFACE, Network
from tests.parallel.cable import laid
from tests.parallel.ranks import HERE, Ranks

LOOP = HERE / "loop.py"

pytestmark = pytest.mark.net


@pytest.fixture
def cable() -> Iterator[Network]:
    with laid() as cable:
        yield cable


@pytest.mark.parametrize("named", [True, False], ids=["GLOO_SOCKET_IFNAME", "found"])
def test_two_machines(cable: Network, named: bool, tmp_path: Path) -> None:
    """With the interface named by the user, and found by us: a host's own name leads to loopback here."""
    per_rank = [{"GLOO_SOCKET_IFNAME": INTERFACE if named else "", "LOCAL_WORLD_SIZE": "1"}] * 2
    with Ranks(
        LOOP, ["all_reduce", "20", "0.5"], 2, tmp_path,
        per_rank=per_rank, prefix=cable.prefix, address=cable.addresses[0],
    ) as ranks:  # fmt: skip
        assert ranks.wait(60) == {0: 0, 1: 0}, ranks.everything()
        assert "done" in ranks.out(1)


@pytest.mark.parametrize("kind", ["all_reduce", "sampling", "fused_norm", "star"])
def test_cut_cable_ends_both_within_the_timeout(cable: Network, kind: str, tmp_path: Path) -> None:
    """Packets vanish without any sign: only the timeout, 5 s here, can tell."""
    with Ranks(
        LOOP, [kind, "5"], 2, tmp_path,
        env={"START": "start"}, prefix=cable.prefix, address=cable.addresses[0],
    ) as ranks:  # fmt: skip
        ranks.release()
        ranks.until("ready")
        begin = time.monotonic()
        cable.cut(1)
        codes = ranks.wait(7)
        assert time.monotonic() - begin > 4
        assert codes == {0: 1, 1: 1}, ranks.everything()
        for rank in codes:
            assert f"fastattn: error: rank {rank}: " in ranks.err(rank)
            assert "no answer within 5 s" in ranks.err(rank)
