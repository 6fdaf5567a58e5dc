"""``fastattn generate`` on two machines: the same tokens, and an end when the cable between them is cut."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastattn.models.load import load
from fastattn.models.sampling import SamplingParams
from lib.network import Network
from tests.parallel.cable import laid
from tests.parallel.ranks import Ranks

PROGRAM = Path(__file__).resolve().parent / "program.py"
PROMPT = "The three largest cities of France are"
TOKENS = 16

pytestmark = pytest.mark.net


@pytest.fixture
def cable() -> Iterator[Network]:
    with laid() as cable:
        yield cable


def generating(cable: Network, folder: Path, *more: str) -> Ranks:
    arguments = ["generate", "smollm2", "--prompt", PROMPT, "--dtype", "fp32", *more]
    return Ranks(PROGRAM, arguments, 2, folder, prefix=cable.prefix, address=cable.addresses[0])


def test_the_same_tokens_as_one_process(cable: Network, tmp_path: Path) -> None:
    with generating(cable, tmp_path, "--max-tokens", str(TOKENS), "--json") as ranks:
        assert ranks.wait(120) == {0: 0, 1: 0}, ranks.everything()
        facts = json.loads(ranks.out(0))
        assert ranks.out(1) == ""
    (alone,) = load("smollm2", dtype="fp32").generate([PROMPT], SamplingParams(max_tokens=TOKENS))
    assert facts["ranks"] == 2
    assert facts["completions"][0]["token_ids"] == alone.token_ids


def test_a_cut_cable_ends_both_within_the_timeout(cable: Network, tmp_path: Path) -> None:
    more = ("--max-tokens", "4000", "--ignore-eos", "--timeout", "5")
    with generating(cable, tmp_path, *more) as ranks:
        deadline = time.monotonic() + 90
        while len(ranks.out(0)) < 20:  # text is being streamed
            assert time.monotonic() < deadline, ranks.everything()
            time.sleep(0.05)
        cable.cut(1)
        assert ranks.wait(8) == {0: 1, 1: 1}, ranks.everything()
        for rank in (0, 1):
            assert f"fastattn: error: rank {rank}: " in ranks.err(rank), ranks.everything()
            assert "no answer within 5 s" in ranks.err(rank), ranks.everything()
