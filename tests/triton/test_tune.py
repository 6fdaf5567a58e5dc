"""`fastattn tune`: what it finds serves later calls, and nothing else ever tunes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastattn import cli
from fastattn.attention import build_args
from fastattn.spec import AttentionArgs

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
    assert 0 < found.seconds <= found.served_seconds

    q, k = (torch.empty(1, n, h, 64, dtype=torch.float16, device=DEVICE) for n, h in ((1, 4), (99, 2)))
    a = build_args(q, k, k)
    shipped = tile(here, need)
    assert plan(a, here).tile[1:] == shipped[1:]
    other = shipped._replace(block_n=16, num_warps=8)
    path = tuned.save(here, tuned.Tuned({need: other}))
    assert plan(a, here).tile[1:] == other[1:]
    tuned.save(here, tuned.Tuned({Need(False, 64, 2): shipped}))
    assert tuned.load(here).attention == {need: other, Need(False, 64, 2): shipped}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("need", [(16, 4), (256, 4), (64, 8)], ids=str)
def test_search_of_linear_tiles(need: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.triton_ops import linear_few, linear_many, tune_linear, tuned
    from fastattn.triton_ops.device import chip
    from fastattn.triton_ops.linear_tiles import MANY, LinearNeed, linear_tile

    here, wanted = chip(torch.device(DEVICE)), LinearNeed(*need)
    if DEVICE == "cpu":  # some, of more than a hundred
        every = tune_linear.candidates
        monkeypatch.setattr(tune_linear, "candidates", lambda *a: list(every(*a))[::40])
    sizes = tune_linear.Sizes(out=96, inn=256, many=70, distinct_bytes=30_000)
    (found,) = tune_linear.search(torch.device(DEVICE), [wanted], sizes, rounds=1)
    assert found.tried > 2
    assert 0 < found.seconds <= found.served_seconds

    other = linear_tile(here, wanted)._replace(block_n=32)
    tuned.save(here, tuned.Tuned(linear={wanted: other}))
    assert tuned.load(here) == tuned.Tuned(linear={wanted: other})
    x, (w, *_) = tune_linear.operands(wanted, sizes, torch.device(DEVICE))
    if need[0] == MANY:
        assert linear_many.many_rows_tile(x, w).block_n == 32
    else:
        ran = []
        monkeypatch.setattr(linear_few, "run_few", lambda x, w, t: ran.append(t))
        linear_few.few_rows(x, w)
        assert ran == [other]


@pytest.mark.parametrize("decode", [True, False])
def test_a_second_search_keeps_what_the_first_found(decode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile that serves is the one to beat, and stays as it is where nothing beats it."""
    from fastattn.triton_ops import tune, tuned
    from fastattn.triton_ops.device import chip
    from fastattn.triton_ops.tiles import Need, tile

    here, need = chip(torch.device(DEVICE)), Need(decode, 64, 2)
    first = tile(here, need)._replace(block_m=32, block_n=16, num_warps=8)
    tuned.save(here, tuned.Tuned({need: first}))
    monkeypatch.setattr(tune, "_candidates", lambda _, before, *rest: [before])
    monkeypatch.setattr(tune, "times", lambda *_: [1.0, 2.0])
    sizes = tune.Sizes(heads=2, kv_heads=1, prefill=80, batch=1, keys=20)
    (found,) = tune.search(torch.device(DEVICE), [need], sizes)
    assert found.tile == first
    monkeypatch.setattr(tune, "times", lambda *_: [2.0, 1.0])
    (found,) = tune.search(torch.device(DEVICE), [need], sizes)
    assert found.tile == first._replace(block_m=found.tile.block_m)
    assert found.tile.block_m == 32 or not decode


def test_a_candidate_that_ptxas_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import PTXASError

    from fastattn.triton_ops import tune
    from fastattn.triton_ops.attention import run
    from fastattn.triton_ops.device import chip
    from fastattn.triton_ops.plan import Plan, plan
    from fastattn.triton_ops.tiles import Need

    def refuse(a: AttentionArgs, p: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        if p != shipped:
            raise PTXASError("too much of everything")
        return run(a, p)

    sizes = tune.Sizes(heads=2, kv_heads=1, batch=1, keys=20)
    need, here = Need(True, 64, 2), chip(torch.device(DEVICE))
    q, k = (torch.empty(1, n, h, 64, dtype=torch.float16, device=DEVICE) for n, h in ((1, 2), (20, 1)))
    shipped = plan(build_args(q, k, k), here)
    monkeypatch.setattr(tune, "run", refuse)
    (found,) = tune.search(torch.device(DEVICE), [need], sizes, rounds=1)
    assert found.tried == 1


@pytest.mark.parametrize("features", ["none", "mask", "packed"])
def test_a_tile_of_specialized_warps_serves_calls_that_specialize(features: str) -> None:
    from fastattn.triton_ops import tuned
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.plan import plan
    from fastattn.triton_ops.tiles import Need, Tile, tile

    here, need, special = CHIPS["H100"], Need(False, 128, 2), Tile(128, 128, 4, 2, True)
    tuned.save(here, tuned.Tuned({need: special}))
    meta = torch.device("meta")
    q, k = (torch.empty(1, 4096, h, 128, dtype=torch.float16, device=meta) for h in (8, 2))
    options: dict[str, torch.Tensor] = {}
    if features == "mask":
        options = {"attn_mask": torch.empty(4096, 4096, dtype=torch.bool, device=meta)}
    elif features == "packed":
        q, k = q[0], k[0]
        spans = torch.empty(3, dtype=torch.int32, device=meta)
        options = {"cu_seqlens_q": spans, "cu_seqlens_k": spans}
    p = plan(build_args(q, k, k, **options), here)
    if features == "none":
        assert p.specialize
        assert p.tile == special
    else:
        assert not p.specialize
        assert p.tile.num_warps == tile(here, need).num_warps


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"attention": 3, "linear": []}', '{"attention": []}',
     '{"attention": [[[true, 64, 2], [17, 64, 4, 3, false]]], "linear": []}',
     '{"attention": [[[true, 64, 2], [16, 64, 4]]], "linear": []}',
     '{"attention": [], "linear": [[[16, 4], [16, 64, 16, 4, 3]]]}'],
)  # fmt: skip
def test_a_damaged_file_counts_as_absent(text: str) -> None:
    from fastattn.triton_ops import tuned
    from fastattn.triton_ops.device import CHIPS

    path = tuned.file(CHIPS["A100"])
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert tuned.load(CHIPS["A100"]) == tuned.Tuned()


def test_other_versions_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile measured with other kernels or another compiler says nothing of these."""
    from fastattn.triton_ops import tuned
    from fastattn.triton_ops.device import CHIPS

    files = {tuned.file(CHIPS["A100"]), tuned.file(CHIPS["H100"])}
    monkeypatch.setattr(tuned, "__version__", "0.0.1")
    files.add(tuned.file(CHIPS["A100"]))
    monkeypatch.setattr("triton.__version__", "3.0")
    files.add(tuned.file(CHIPS["A100"]))
    assert len(files) == 4


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
    assert capsys.readouterr().out.count("the table's") == 6 + 8
