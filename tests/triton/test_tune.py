"""`fastattn tune`: what it finds serves later calls, and nothing else ever tunes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn import cli
from fastattn.attention import build_args

from .calls import DEVICE

pytestmark = [pytest.mark.emulate("triton"), pytest.mark.toolchain, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from fastattn.triton_ops import tuned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.load.cache_clear()
    return tmp_path


def test_search_measures_and_calls_use_it() -> None:
    from fastattn.triton_ops import tune, tuned
    from fastattn.triton_ops.device import chip
    from fastattn.triton_ops.plan import plan
    from fastattn.triton_ops.tiles import Need, tile

    here, need = chip(torch.device(DEVICE)), Need(True, 64, 2)
    sizes = tune.Sizes(heads=2, kv_heads=1, batch=1, keys=20)
    (found,) = tune.search(torch.device(DEVICE), [need], sizes, rounds=1)
    assert found.need == need
    assert found.tried > 8
    assert 0 < found.seconds <= found.shipped_seconds

    q, k = (torch.empty(1, n, h, 64, dtype=torch.float16, device=DEVICE) for n, h in ((1, 4), (99, 2)))
    a = build_args(q, k, k)
    shipped = tile(here, need)
    assert plan(a, here).tile[1:] == shipped[1:]
    other = shipped._replace(block_n=16, num_warps=8)
    path = tuned.save(here, {need: other})
    assert plan(a, here).tile[1:] == other[1:]
    tuned.save(here, {Need(False, 64, 2): shipped})
    assert tuned.load(here) == {need: other, Need(False, 64, 2): shipped}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"entries": 3}', '{"entries": [{"need": [true, 64, 2], "tile": [17, 64, 4, 3, false]}]}',
     '{"entries": [{"need": [true, 64, 2], "tile": [16, 64, 4]}]}'],
)  # fmt: skip
def test_a_damaged_file_counts_as_absent(text: str) -> None:
    from fastattn.triton_ops import tuned
    from fastattn.triton_ops.device import CHIPS

    path = tuned.file(CHIPS["A100"])
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tuned.load(CHIPS["A100"]) == {}


def test_a_call_writes_nothing(folder: Path) -> None:
    import fastattn

    q = torch.randn(1, 3, 2, 16, device=DEVICE)
    fastattn.attention(q, q, q, backend="triton")
    assert not (folder / "fastattn" / "triton-tiles").exists()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU can be tuned")
def test_emulation_is_not_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune"]) == 1
    assert "an emulated backend has no speed to tune" in capsys.readouterr().err


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("the table's") == 6
