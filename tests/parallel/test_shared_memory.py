"""Collectives through shared memory: ranks as threads of this process, and as processes."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.collectives.shared_memory import SharedMemory
from fastattn.native import kernels
from fastattn.parallel import local
from fastattn.spec import SyncError
from tests.models.builders import hf_model, save_hf
from tests.parallel.ranks import Ranks

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ends(world: int, timeout_s: float = 20.0) -> list[SharedMemory]:
    memory = mmap.mmap(-1, SharedMemory.bytes_for(world))
    return [SharedMemory(rank, world, timeout_s, memory, lambda: None) for rank in range(world)]


def on_ranks(world: int, body: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(world) as pool:
        return [f.result() for f in [pool.submit(body, rank) for rank in range(world)]]


def operand(rank: int, number: int, count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return torch.randn(count, generator=generator).to(dtype)


def total(world: int, number: int, count: int, dtype: torch.dtype) -> Tensor:
    parts = [operand(rank, number, count, dtype).float() for rank in range(world)]
    return sum(parts[1:], parts[0]).to(dtype)


# Counts up to several rings; sums of more than 32 KB take two steps when more than two ranks share them.
counts = st.one_of(st.integers(0, 70), st.sampled_from([8192, 8193, 32768, 40_001, 300_007, 700_001]))
operations = st.lists(
    st.tuples(st.sampled_from(["sum", "gather", "broadcast"]), counts, st.sampled_from(DTYPES)), max_size=6
)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), operations, st.randoms(use_true_random=False))
def test_any_operations_in_any_order(
    world: int, listed: list[tuple[str, int, torch.dtype]], random: Any
) -> None:
    """Sums are started ahead, and waited for in an order of each rank's own."""
    shared = ends(world)
    orders = [random.sample(range(len(listed)), len(listed)) for _ in range(world)]

    def body(rank: int) -> list[Tensor]:
        mine, results, works = shared[rank], {}, {}
        for i, (kind, count, dtype) in enumerate(listed):
            x = results[i] = operand(rank, i, count, dtype)
            if kind == "sum":
                works[i] = mine.sum(x, f"sum {i}")
            elif kind == "gather":
                results[i] = torch.cat(mine.gather(x, f"gather {i}"))
            else:
                mine.broadcast(x, f"broadcast {i}", i % world)
        for i in orders[rank]:
            if i in works:
                works[i].wait()
        return [results[i] for i in range(len(listed))]

    results = on_ranks(world, body)
    for i, (kind, count, dtype) in enumerate(listed):
        if kind == "sum":
            expected = total(world, i, count, dtype)
        elif kind == "gather":
            expected = torch.cat([operand(rank, i, count, dtype) for rank in range(world)])
        else:
            expected = operand(i % world, i, count, dtype)
        for rank in range(world):
            torch.testing.assert_close(results[rank][i], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integers_are_carried(dtype: torch.dtype) -> None:
    shared = ends(2)
    given = torch.arange(7).to(dtype)

    def body(rank: int) -> tuple[Tensor, list[Tensor]]:
        x = given.clone() if rank == 1 else torch.zeros_like(given)
        parts = shared[rank].gather(x, "test")
        shared[rank].broadcast(x, "test", 1)
        return x, parts

    for x, parts in on_ranks(2, body):
        assert torch.equal(x, given)
        assert torch.equal(torch.stack(parts), torch.stack([torch.zeros_like(given), given]))


def test_many_sums_reuse_the_slots() -> None:
    shared = ends(2)

    def body(rank: int) -> Tensor:
        x = torch.full((3,), float(rank))
        for _ in range(20_000):
            shared[rank].sum(x, "test").wait()
            x.mul_(0.5)
        return x

    assert [x.tolist() for x in on_ranks(2, body)] == [[0.5] * 3] * 2


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (lambda end: end.sum(torch.zeros(4), "test").wait(), "rank 1 sums 16 bytes of float32"),
        (lambda end: end.sum(torch.zeros(6).half(), "test").wait(), "rank 1 sums 12 bytes of float16"),
        (lambda end: end.gather(torch.zeros(3), "test"), "rank 1 gathers 12 bytes of float32"),
        (
            lambda end: end.broadcast(torch.zeros(3), "test", 1),
            "rank 1 broadcasts 12 bytes of float32 from rank 1",
        ),
    ],
    ids=["size", "dtype", "kind", "broadcast"],
)
def test_ranks_that_differ_are_told(other: Callable[[SharedMemory], Any], reason: str) -> None:
    """gloo would give wrong sums."""
    shared = ends(2)

    def body(rank: int) -> str:
        with pytest.raises(SyncError) as caught:
            shared[0].sum(torch.zeros(3), "layer 3 mlp").wait() if rank == 0 else other(shared[1])
        return str(caught.value)

    first, second = on_ranks(2, body)
    assert first.startswith(f"rank 0: layer 3 mlp: the ranks differ: {reason}")
    assert "rank 0 sums 12 bytes of float32 as operation 0" in second


def test_a_late_rank_is_named_and_the_end_is_final() -> None:
    late, *_ = ends(3, timeout_s=0.2)
    work = late.sum(torch.zeros(3), "layer 3 mlp")
    with pytest.raises(
        SyncError, match=r"rank 0: layer 3 mlp, with rank 1: no answer within 0.2 s: rank 1 is"
    ):
        work.wait()
    with pytest.raises(SyncError, match="layer 3 mlp, with rank 1"):
        late.sum(torch.zeros(3), "layer 4 attn").wait()


def test_a_lost_rank_is_named_at_once() -> None:
    memory = mmap.mmap(-1, SharedMemory.bytes_for(2))
    end = SharedMemory(0, 2, 60.0, memory, lambda: 1)
    with pytest.raises(SyncError, match="rank 0: layer 3 mlp: rank 1 ended"):
        end.sum(torch.zeros(3), "layer 3 mlp").wait()


def test_what_it_takes() -> None:
    end = ends(1)[0]
    assert end.sums(torch.zeros(1))
    assert not end.sums(torch.zeros(1).double())
    assert end.carries(torch.zeros(1).long())
    assert not end.carries(torch.zeros(1).double())


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"rank": 2}, "rank: 2"),
        ({"slot_bytes": 100}, "slot_bytes: 100, expected a multiple of 64"),
        ({"slots": 1 << 20}, "memory: "),
    ],
    ids=["rank", "slot_bytes", "memory"],
)
def test_wrong_ends_are_refused(given: dict[str, int], error: str) -> None:
    memory = mmap.mmap(-1, SharedMemory.bytes_for(2))
    with pytest.raises(ValueError, match=error):
        kernels.SharedMemory(memory, **{"rank": 0, "world": 2, "slots": 8, "slot_bytes": 128, **given})


def shared_by(world: int, folder: Path, per_rank: Sequence[Mapping[str, str]] = ()) -> list[str]:
    """What each rank of a group says of its memory."""
    program = folder / "program.py"
    program.write_text(
        "from fastattn.collectives.exchange import shares_memory\n"
        "from fastattn.parallel import group\n"
        "g = group.init(20)\n"
        "print(shares_memory(g))\n"
        "group.shutdown(g)\n"
    )
    with Ranks(program, [], world, folder, per_rank=per_rank) as ranks:
        assert set(ranks.wait(60).values()) == {0}, ranks.everything()
        return [ranks.out(rank).strip() for rank in range(world)]


def test_ranks_of_one_machine_share_memory(tmp_path: Path) -> None:
    assert shared_by(3, tmp_path) == ["True"] * 3


@pytest.mark.parametrize("without", [0, 1])
def test_all_share_or_none(without: int, tmp_path: Path) -> None:
    setting = [{}, {}]
    setting[without] = {"FASTATTN_SHARED_MEMORY": "0"}
    assert shared_by(2, tmp_path, setting) == ["False"] * 2


@pytest.mark.parametrize("offer", [b"", b"00 /proc/1/fd/0 00"], ids=["nothing", "another machine's"])
def test_offers_of_no_use(offer: bytes) -> None:
    assert local.mapped(offer) is None


def test_a_path_that_means_another_file_is_not_taken(tmp_path: Path) -> None:
    """As in another container, where the same process number is another process."""
    here = local.identity(network=True).hex()
    file, offer = local.offered(4096)
    assert file is not None
    try:
        assert local.mapped(offer) is not None
        machine, path, token = offer.decode().split()
        for other in (
            f"{machine} {path} {'0' * len(token)}",
            f"{here} {tmp_path} {token}",
            f"{here} /proc/{os.getpid()}/fd/99999 {token}",
        ):
            assert local.mapped(other.encode()) is None
    finally:
        os.close(file)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_rank_that_goes_missing_in_a_native_forward(how: signal.Signals, tmp_path: Path) -> None:
    model = save_hf(hf_model("llama", seed=3), tmp_path / "model")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, fastattn\n"
        "from fastattn import dispatch\n"
        "from fastattn.models.sampling import SamplingParams\n"
        "from fastattn.parallel import group\n"
        "from fastattn.spec import SyncError\n"
        "g = group.init(2)\n"
        "model = fastattn.load(sys.argv[1], dtype='fp32', tp=g)\n"
        "prompts = [[1, 2, 3]] if g.rank == 0 else []\n"
        "asked = SamplingParams(max_tokens=20, ignore_eos=True)\n"
        "model.generate(prompts, asked)\n"
        "assert dispatch.calls['cpu', 'decoder'] == 20, dispatch.calls\n"  # one call a forward
        "print('ready', flush=True)\n"
        "try:\n"
        "    while True:\n"
        "        model.generate(prompts, asked)\n"
        "except SyncError as error:\n"
        "    group.abort(g, error)\n"
    )
    with Ranks(program, [str(model)], 2, tmp_path) as ranks:
        ranks.until("ready")
        ranks.send(1, how)
        assert ranks.wait(5, [0]) == {0: 1}, ranks.everything()
        reason = "rank 1 ended" if how == signal.SIGKILL else "with rank 1: no answer within 2 s"
        assert reason in ranks.err(0), ranks.everything()
