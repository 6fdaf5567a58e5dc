"""`fastattn.load(path, tp=...)`: one line from a launcher's environment to a sharded model."""

from __future__ import annotations

from pathlib import Path

import pytest

import fastattn
from fastattn.parallel.group import single
from tests.models.builders import hf_model, save_hf
from tests.parallel.ranks import Ranks

PROGRAM = """
import sys, fastattn
from fastattn.models.sampling import SamplingParams
model = fastattn.load(sys.argv[1], tp="auto")
prompts = [[1, 2, 3]] if model.group.rank == 0 else []
(done,) = model.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
print(model.group.rank, model.group.world, *done.token_ids)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_hf(hf_model("llama", seed=1), tmp_path)


def test_auto_joins_the_launchers_ranks(path: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    lines = []
    for world in (1, 2):
        with Ranks(program, [str(path)], world, tmp_path) as ranks:
            assert set(ranks.wait(60).values()) == {0}, ranks.everything()
            lines += [ranks.out(r).split() for r in range(world)]
    assert [line[:2] for line in lines] == [["0", "1"], ["0", "2"], ["1", "2"]]
    assert len({tuple(line[2:]) for line in lines}) == 1
    assert len(lines[0]) == 7


def test_a_group_none_or_auto(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert fastattn.load(path).group == fastattn.load(path, tp=single()).group
    with pytest.raises(ValueError, match="tp: 'all', expected auto, a TPGroup or None"):
        fastattn.load(path, tp="all")
