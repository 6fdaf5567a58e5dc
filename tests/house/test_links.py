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

import collectives as bench_collectives
import links as bench_links
from fastattn.spec import Link
from lib import args, collectives_worker, network
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
    assert args.link(text)[:2] == pytest.approx(expected[:2])
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
    assert args.link(args.link_name(link))[:2] == pytest.approx(link[:2], rel=1e-5)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(network.Unavailable, match=r"root's rights.*C\+\+ compiler 'no-such-compiler'"),
        network.network(2, Link(0.0, 1e6)),
    ):
        pass


@pytest.mark.net
@pytest.mark.parametrize("text", ["100mbit/1ms", "50mbit/5ms"])
def test_a_link_keeps_what_was_asked(text: str) -> None:
    """Never more; less only as far as a busy machine, and acknowledgements in streams both ways, explain."""
    link, ranks = args.link(text), 3
    with laid(ranks, link):  # skips where there can be none
        pass
    seen = bench_links.probe(link, ranks, 0.0, 1.0)
    trips = sorted(seen["round_trips_s"])
    assert 0.98 * 2 * link.latency_s < trips[0]
    assert trips[len(trips) // 2] < 2 * link.latency_s + 2e-3
    for metric in ("one_way", "both_ways", "all_to_one", "one_to_all"):
        share = seen[metric] / (link.bytes_per_s * network.PAYLOAD)
        assert (0.5 if metric == "both_ways" else 0.75) < share < 1.02, metric


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


def test_sizes_reach_what_the_link_carries() -> None:
    assert bench_collectives.sizes(args.link("100mbit/1ms"), 0.05) == (4096, 32768, 262144, 622592)
    assert bench_collectives.sizes(args.link("64kbit/1ms"), 0.05) == (4096,)
    assert bench_collectives.sizes(args.link("10gbit/50us"), 1.0)[-1] == bench_collectives.MOST


def test_records_of_collectives() -> None:
    def row(policy: str, ms: float, model_ms: float | None) -> dict[str, object]:
        return vars(collectives_worker.Row(policy, 4096, 5, ms, 0.1, model_ms, 1.0))

    rows = [row(collectives_worker.PEER, 6.0, None), row("direct", 3.0, 2.5), row("star", 4.0, 2.0)]
    made = bench_collectives.to_records("100mbit/1ms ranks=2 bf16", {"rows": rows, "env": {}})
    found = {(r.case, r.metric): r for r in made}
    direct = found["100mbit/1ms ranks=2 bf16 policy=direct bytes=4096", "time"]
    assert (direct.ratio, direct.limit_value, direct.claim) == (2.0, 1.0, "emulated")
    modelled = found["100mbit/1ms ranks=2 bf16 policy=star bytes=4096", "modelled time"]
    assert (modelled.ours, modelled.peer_value, modelled.claim) == (2.0, 4.0, "modelled")
    choice = found["100mbit/1ms ranks=2 bf16 bytes=4096", "choice by the model over the fastest"]
    assert choice.ours == pytest.approx(4 / 3)


@pytest.mark.net
def test_collectives_program(tmp_path: Path) -> None:
    """direct saves a hop of 10 ms; the wire's floor holds."""
    with laid():
        pass
    out, figure = tmp_path / "collectives.json", tmp_path / "collectives.png"
    line = "--link 100mbit/10ms --ranks 2,3 --policy exact direct --bytes 4096,65536 --budget 0.2"
    files = ("--json", str(out), "--plot", str(figure))
    program = [sys.executable, str(ROOT / "bench" / "collectives.py")]
    subprocess.run([*program, *line.split(), *files], check=True, capture_output=True, timeout=120)
    assert figure.read_bytes().startswith(b"\x89PNG")
    records = {(r["case"], r["metric"]): r for r in json.loads(out.read_text())}
    for ranks in (2, 3):
        for size in (4096, 65536):
            times = {
                policy: records[f"100mbit/10ms ranks={ranks} bf16 policy={policy} bytes={size}", "time"]
                for policy in ("exact", "direct")
            }
            assert all(r["ours"] > r["limit_value"] > 10 for r in times.values())
            assert all(r["claim"] == "emulated" for r in times.values())
        small = records[f"100mbit/10ms ranks={ranks} bf16 policy=direct bytes=4096", "time"]
        assert small["ratio"] > 1.1


@pytest.mark.parametrize("text", ["square", "star:hub", "token_weave+exact", "tiled:tiles=0/1"])
def test_collectives_refuses_policies(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_collectives.parser().parse_args(["--policy", text])
    assert "expected" in capsys.readouterr().err


@pytest.mark.net
def test_llm_program_over_a_link(tmp_path: Path) -> None:
    """Two policies on one loaded model: neither is faster than the link."""
    with laid():
        pass
    out = tmp_path / "llm.json"
    line = "--link 50mbit/2ms --sync exact direct --tensor_para_size 2 --batch_size 2 --input_len 12"
    more = ("--output_len", "6", "--iterations", "1", "--threads", "1", "--chat", "", "--json", str(out))
    program = [sys.executable, str(ROOT / "bench" / "llm.py")]
    done = subprocess.run([*program, *line.split(), *more], check=True, capture_output=True, timeout=200)
    assert b"the ranks' link is emulated: 50mbit/2ms" in done.stdout
    records = {(r["case"], r["metric"]): r for r in json.loads(out.read_text())}
    case = "smollm2 fp32 act=none batch=2 input=12 output=6 tp=2 link=50mbit/2ms"
    for name in (case, f"{case} sync=direct"):
        for metric in ("TTFT", "TPOT"):
            record = records[name, metric]
            assert record["claim"] == "emulated"
            assert record["limit"] == "link"
            assert record["ours"] > record["limit_value"] > 60 * 2
    assert records[f"{case} sync=direct", "TPOT"]["peer"] == "fastattn sync=exact"
    assert records[f"{case} sync=direct", "TPOT"]["ratio"] > 0.5
