"""Emulated links: how they are written, that they keep what was asked, and that nothing outlives them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import links as bench_links
from fastattn.spec import Link
from lib import args, network
from tests.parallel.cable import laid

from .markdown import ROOT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10gbit/50us", Link(50e-6, 1.25e9)),
        ("100mbit/1ms", Link(1e-3, 12.5e6)),
        ("1.5mbit/2s", Link(2.0, 187.5e3)),
        ("64kbit/0us", Link(0.0, 8e3)),
    ],
)
def test_link(text: str, expected: Link) -> None:
    assert args.link(text) == pytest.approx(expected)
    assert args.links(f"{text},{text}") == (args.link(text),) * 2
    assert args.link_name(args.link(text)) == text


@pytest.mark.parametrize(
    "text",
    ["", "100mbit", "100mbit/", "/1ms", "0mbit/1ms", "-1mbit/1ms", "100/1ms", "100mb/1ms", "1mbit/1",
     "1e9kbit/1ms", "100mbit/1ms/", "100mbit/1ms,", "100 mbit/1ms", "infgbit/1ms"],
)  # fmt: skip
def test_link_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        args.links(text)


@given(st.integers(1, 10**6), st.sampled_from(["kbit", "mbit", "gbit"]), st.integers(0, 10**5))
def test_a_links_name_is_read_as_the_link(rate: int, unit: str, microseconds: int) -> None:
    link = args.link(f"{rate}{unit}/{microseconds}us")
    assert args.link(args.link_name(link)) == pytest.approx(link, rel=1e-5)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(network.Unavailable, match=r"root's rights.*C\+\+ compiler 'no-such-compiler'"),
        network.network(2, Link(0.0, 1e6)),
    ):
        pass


@pytest.mark.net
@pytest.mark.parametrize("text", ["1gbit/1ms", "50mbit/5ms"])
def test_a_link_keeps_what_was_asked(text: str) -> None:
    link, ranks = args.link(text), 3
    with laid(ranks, link):  # skips where there can be none
        pass
    seen = bench_links.probe(link, ranks, 0.0, 1.0)
    trips = sorted(seen["round_trips_s"])
    assert 0.98 * 2 * link.latency_s < trips[0]
    assert trips[len(trips) // 2] < 2 * link.latency_s + 1e-3
    for metric in ("one_way", "all_to_one", "one_to_all"):
        share = seen[metric] / (link.bytes_per_s * network.PAYLOAD)
        assert 0.85 < share < 1.02, metric
    # The other direction's acknowledgements take a share.
    assert 0.7 < seen["both_ways"] / (link.bytes_per_s * network.PAYLOAD) < 1.02


@pytest.mark.net
def test_jitter_adds_up_to_what_was_asked() -> None:
    link = Link(1e-3, 12.5e6)
    with laid(2, link):
        pass
    trips = sorted(bench_links.probe(link, 2, 4e-3, 0.1)["round_trips_s"])
    assert 1.95e-3 < trips[0] < 4e-3
    assert 5e-3 < trips[len(trips) // 2] < 7e-3  # the sum of two even distributions on [0, 4) has median 4
    assert 7.2e-3 < trips[90] < 9.7e-3


REPLY = """
import os, socket, sys
if os.environ["RANK"] == "0":
    with socket.create_server(("", int(os.environ["MASTER_PORT"]))) as server:
        assert server.accept()[0].recv(100, socket.MSG_WAITALL) == sys.argv[1].encode()
else:
    while (s := socket.socket()).connect_ex((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))):
        s.close()
    s.sendall(sys.argv[1].encode())
"""


@pytest.mark.net
def test_two_networks_do_not_meet() -> None:
    with laid() as one, laid() as other:
        assert one.addresses == other.addresses
        for net, word in ((one, "one"), (other, "other"), (one, "again")):
            assert net.run([sys.executable, "-c", REPLY, word]) == 0


@pytest.mark.net
def test_a_rank_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_GRACE_S", 0.5)
    begin = time.monotonic()
    with laid(3) as net:
        assert net.run(["sh", "-c", 'if [ "$RANK" = 1 ]; then exit 7; fi; sleep 60']) == 7
    assert time.monotonic() - begin < 20


HOLD = """
import sys
sys.path.insert(0, "bench")
from fastattn.spec import Link
from lib.network import network
with network(2, Link(1e-3, 1e7)) as net:
    print(net._switch.pid, net.start(1, ["sleep", "1000"]).pid, flush=True)
    net.run(["sleep", "1000"])
"""


@pytest.mark.net
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_program(number: signal.Signals) -> None:
    with laid():
        pass
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        processes = [Path("/proc", pid) for pid in holder.stdout.readline().split()]
        assert len(processes) == 2
        assert all(p.exists() for p in processes)
        holder.send_signal(number)
        holder.wait(20)
        end = time.monotonic() + 5
        while any(_runs(p) for p in processes):
            assert time.monotonic() < end, processes
            time.sleep(0.02)


def _runs(process: Path) -> bool:
    """Whether it has neither ended nor waits, dead, for a parent that will not come."""
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.net
def test_links_program(tmp_path: Path) -> None:
    with laid():
        pass
    program, out = [sys.executable, str(ROOT / "bench" / "links.py")], tmp_path / "links.json"
    line = ["--link", "100mbit/1ms", "--seconds", "0.2", "--json", str(out)]
    subprocess.run([*program, *line], check=True, capture_output=True, timeout=60)
    records = {r["metric"]: r for r in json.loads(out.read_text())}
    assert {r["claim"] for r in records.values()} == {"emulated"}
    assert records["round trip"]["limit_value"] == 2000 < records["round trip"]["ours"]
    assert 0 < records["throughput one way"]["ours"] < 100
    said = 'test "$WORLD_SIZE $MASTER_ADDR" = "3 10.213.0.1" && exit 40'
    line = ["--link", "100mbit/1ms", "--ranks", "3", "--", "sh", "-c", said]
    assert subprocess.run([*program, *line], check=False, timeout=60).returncode == 40
    for wrong in (["--ranks", "1"], ["--link", "100mbit"], ["--", "true"]):
        assert subprocess.run([*program, *wrong], check=False, capture_output=True, timeout=60).returncode
