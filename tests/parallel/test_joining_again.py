"""Groups joined more than once: by one process, and by processes that torchrun starts anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.parallel.ranks import ROOT, Ranks

SUM = """
import os, torch
import torch.distributed as dist
from fastattn.collectives import exchange
from fastattn.parallel import group

def add(g):
    x = torch.ones(5)
    exchange.all_reduce(g, x, "test").wait()
    assert torch.equal(x, torch.full_like(x, g.world)), x
"""

AGAIN = """
def refused(**arguments):
    try:
        group.init(**arguments)
    except ValueError as error:
        print(error)

for timeout_s in (20, 20, 30):
    g = group.init(timeout_s, split=(2, 1))
    add(g)
    assert group.init() is group.init(timeout_s, (4, 2)) is group.ranks_of("auto") is g
    refused(timeout_s=7)
    refused(split=(1, 1))
    add(g)
    assert group.shutdown(g)
store = dist.TCPStore("127.0.0.1", int(os.environ["OTHER_PORT"]), 1, is_master=True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
refused()
"""

RESTARTED = """
g = group.init(20)
add(g)
if g.rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os._exit(3)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    import time
    time.sleep(60)  # until torchrun, or the watch, ends it
add(g)
assert group.shutdown(g)
print("done", flush=True)
"""


def test_a_process_joins_again_after_it_left_and_once_at_a_time(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SUM + AGAIN)
    ports = [{"OTHER_PORT": "0"}] * 2
    with Ranks(program, [], 2, tmp_path, per_rank=ports) as ranks:
        assert ranks.wait(60) == {0: 0, 1: 0}, ranks.everything()
        for rank in (0, 1):
            *refused, foreign = ranks.out(rank).splitlines()
            assert len(refused) == 6
            assert "timeout_s: 7, this process is in a group with 20 until its shutdown" in refused[0]
            assert "split: (0.5, 0.5), this process is in a group with (0.66" in refused[1]
            assert "torch.distributed has a process group already" in foreign


def test_torchrun_starts_the_ranks_anew(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SUM + RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout.count("done")) == (0, 2), done.stderr
