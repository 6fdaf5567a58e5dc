"""Ranks that die, stop, stay away or disagree: the others end with a clear error, in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.parallel.ranks import HERE, ROOT, Ranks

LOOP = HERE / "loop.py"


@pytest.mark.parametrize(
    ("world", "victim", "kind"),
    [
        (2, 0, "all_reduce"),
        (3, 0, "sampling"),
        (3, 0, "sampling without shared memory"),
        (3, 1, "star"),
        (3, 2, "fused_norm+compressed:element=int8"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (3, 2, "sampling"),
                (4, 2, "all_reduce"),
                (4, 2, "all_reduce without shared memory"),
                (3, 0, "star"),
                (2, 1, "direct"),
                (3, 0, "tiled+direct:scheme=two_step"),
            )
        ),
    ],
    ids=str,
)
def test_killed_rank_ends_the_others_within_5_s(world: int, victim: int, kind: str, tmp_path: Path) -> None:
    kind, _, without = kind.partition(" without ")
    env = {"FASTATTN_SHARED_MEMORY": "0"} if without else {}
    with Ranks(LOOP, [kind, "60"], world, tmp_path, env=env) as ranks:
        ranks.until("ready")
        assert all(f"rank {victim} ended" in ranks.err(rank) for rank in ranks.kill(victim))


@pytest.mark.parametrize("shared", [True, False], ids=["memory", "sockets"])
def test_stopped_rank_ends_the_others_within_the_timeout(shared: bool, tmp_path: Path) -> None:
    env = {"START": "start", "FASTATTN_SHARED_MEMORY": str(int(shared))}
    with Ranks(LOOP, ["sampling", "4"], 3, tmp_path, env=env) as ranks:
        ranks.release()
        ranks.until("ready")
        begin = time.monotonic()
        ranks.send(1, signal.SIGSTOP)
        codes = ranks.wait(6, [0, 2])
        assert time.monotonic() - begin > 3
        assert codes == {0: 1, 2: 1}, ranks.everything()
        # Whoever gives up first may end the other, whose message then tells of the ended rank.
        messages = ranks.err(0) + ranks.err(2)
        late = "rank 1 is stopped or late" if shared else "another rank is stopped or the link is cut"
        assert f"no answer within 4 s: {late}" in messages


@pytest.mark.parametrize(
    "kind",
    [
        "fused_norm",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("direct:scheme=one_step", "tiled+direct:scheme=two_step")
        ),
    ],
)
def test_rank_that_does_not_answer_is_named(kind: str, tmp_path: Path) -> None:
    """Messages between pairs know who did not send."""
    program = tmp_path / "program.py"
    program.write_text(
        "import time, torch\n"
        "from fastattn.collectives import exchange\n"
        "from fastattn.parallel import group\n"
        "from fastattn.parallel.policies import parse\n"
        "from fastattn.spec import Epilogue, Point, Stream, SyncError\n"
        "from tests.parallel.policy_cases import Given\n"
        "g = group.init(3)\n"
        "exchange.all_reduce(g, torch.ones(1), 'everybody is here').wait()\n"
        "if g.rank == 1:\n"
        "    time.sleep(60)\n"
        "x, norm = torch.ones(6, 96), lambda y, r: (y, y if r is None else y + r)\n"
        f"policy, _ = parse({kind!r})\n"
        "try:\n"
        "    point, epilogue = Point(7, 'mlp', 'prefill'), Epilogue(None, norm)\n"
        "    policy.start(point, Given(x), Stream(x, None), epilogue, g).wait()\n"
        "except SyncError as error:\n"
        "    group.abort(g, error)\n"
    )
    with Ranks(program, [], 3, tmp_path) as ranks:
        assert ranks.wait(40, [0, 2]) == {0: 1, 2: 1}, ranks.everything()
        messages = ranks.err(0) + ranks.err(2)
        assert "layer 7 mlp (prefill)" in messages
        assert ", with rank 1: no answer within 3 s: another rank is stopped or the link is cut" in messages


def test_missing_rank_ends_the_others_within_the_timeout(tmp_path: Path) -> None:
    with Ranks(LOOP, ["all_reduce", "2"], 3, tmp_path, start=[0, 1], env={"START": "start"}) as ranks:
        ranks.release()
        codes = ranks.wait(20)
        assert codes == {0: 1, 1: 1}, ranks.everything()
        for rank in codes:
            assert f"fastattn: error: rank {rank}: start-up: " in ranks.err(rank)
        assert "3 ranks meet at 127.0.0.1:" in ranks.err(0)


@pytest.mark.parametrize("ending", ["", "assert group.shutdown(g)"], ids=["careless", "shutdown"])
def test_exit_keeps_the_status(ending: str, tmp_path: Path) -> None:
    """gloo's threads release tensors late: an interpreter that ends meanwhile would abort (SIGABRT)."""
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from fastattn.collectives import exchange\n"
        "from fastattn.parallel import group\n"
        "g = group.init(20)\n"
        "for _ in range(20):\n"
        "    exchange.all_reduce(g, torch.ones(576), 'test').wait()\n"
        f"{ending}\n"
        "if g.rank == 1:\n"
        "    raise KeyError('uncaught')\n"
    )
    with Ranks(program, [], 3, tmp_path) as ranks:
        assert ranks.wait(60) == {0: 0, 1: 1, 2: 0}, ranks.everything()
        assert "KeyError: 'uncaught'" in ranks.err(1)


def test_abort_ends_a_process_whose_errors_nobody_reads(tmp_path: Path) -> None:
    """From another thread too, as the watch calls it."""
    reader, writer = os.pipe()
    os.close(reader)
    program = (
        "import threading, time\n"
        "from fastattn.parallel import group\n"
        "threading.Thread(target=group.abort, args=(group.single(), ValueError('lost'))).start()\n"
        "time.sleep(60)\n"
    )
    with os.fdopen(writer, "wb") as stderr:
        ended = subprocess.run(
            [sys.executable, "-c", program], stderr=stderr, cwd=tmp_path, timeout=30, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert ended.returncode == 1


def test_shares_that_differ_are_refused(tmp_path: Path) -> None:
    program = tmp_path / "shares.py"
    program.write_text(
        "import os\n"
        "from fastattn.parallel import group\n"
        "try:\n"
        "    group.init(20, split=(2, 1) if os.environ['RANK'] == '1' else (1, 1))\n"
        "except group.SyncError as error:\n"
        "    group.abort(group.single(), error)\n"
    )
    with Ranks(program, [], 2, tmp_path) as ranks:
        assert ranks.wait(60) == {0: 1, 1: 1}, ranks.everything()
        for rank in (0, 1):
            assert "start-up check of the shares of work (split): the ranks differ (rank 0: " in ranks.err(
                rank
            )


def test_orderly_end(tmp_path: Path) -> None:
    with Ranks(LOOP, ["all_reduce", "20", "0.2"], 2, tmp_path) as ranks:
        assert ranks.wait(60) == {0: 0, 1: 0}, ranks.everything()
        assert "done" in ranks.out(0)
