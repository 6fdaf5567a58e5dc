"""The paged cache against plain lists of tokens."""

from __future__ import annotations

import mmap
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fastattn import CacheFull, use_backend
from fastattn.memory.attend import attend, narrow
from fastattn.memory.paged import PagedKvCache
from fastattn.spec import KvCache, KvPart, KvStep

HEADS, DIM = 2, 4


def cache_of(pages: int, page_size: int, layers: int = 1) -> PagedKvCache:
    return PagedKvCache(layers, pages, page_size, HEADS, DIM)


def write(cache: PagedKvCache, step: KvStep, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = (torch.randn(step.slots.shape[0], HEADS, DIM, generator=generator) for _ in range(2))
    with use_backend("sdpa"):
        cache.append(0, step, k, v)
    return k, v


def read(part: KvPart, row: int) -> torch.Tensor:
    pages = part.block_table[row].long()
    return part.k[pages].flatten(0, 1)[: int(part.seqused[row])]


def test_is_a_kv_cache() -> None:
    assert isinstance(cache_of(1, 1), KvCache)


@settings(max_examples=60)
@given(
    page_size=st.integers(1, 5),
    moves=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["grow", "free", "truncate"]), st.integers(0, 7)),
        max_size=25,
    ),
)
def test_holds_what_was_written(page_size: int, moves: list[tuple[int, str, int]]) -> None:
    cache, pages = cache_of(12, page_size), 12
    wanted: dict[int, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for seq, move, n in moves:
        if move == "grow":
            have = wanted.get(seq, torch.empty(0, HEADS, DIM))
            try:
                step = cache.reserve([seq], [n])
            except CacheFull:
                held = sum(-(-len(t) // page_size) for s, t in wanted.items() if s != seq)
                assert held + -(-(len(have) + n) // page_size) > pages
                continue
            k, _ = write(cache, step, generator)
            wanted[seq] = torch.cat([have, k])
        elif seq in wanted and move == "free":
            cache.free(seq)
            del wanted[seq]
        elif seq in wanted:
            length = min(n, len(wanted[seq]))
            cache.truncate(seq, length)
            wanted[seq] = wanted[seq][:length]
        assert cache.free_pages == pages - sum(-(-len(t) // page_size) for t in wanted.values())
    for seq, tokens in wanted.items():
        assert cache.length(seq) == len(tokens)
        part = cache.parts(0, cache.reserve([seq], [0]))[0]
        assert torch.equal(read(part, 0), tokens)


def test_full_cache_changes_nothing() -> None:
    cache = cache_of(3, 4)
    cache.reserve([0, 1], [4, 3])
    with pytest.raises(CacheFull, match="1 free pages of 4, 2 are needed"):
        cache.reserve([1, 2], [2, 4])
    assert (cache.length(1), cache.length(2), cache.free_pages) == (3, 0, 1)


@pytest.mark.parametrize(("seqs", "new"), [([0, 0], [1, 1]), ([0], [1, 2]), ([0], [-1])])
def test_bad_reservations(seqs: list[int], new: list[int]) -> None:
    with pytest.raises(ValueError, match="seqs, new"):
        cache_of(4, 4).reserve(seqs, new)


def test_bad_truncation() -> None:
    cache = cache_of(4, 4)
    cache.reserve([7], [3])
    with pytest.raises(ValueError, match="sequence 7 has 3 tokens"):
        cache.truncate(7, 4)


def test_unknown_sequences() -> None:
    with pytest.raises(ValueError, match="seq: 3, the cache has no such sequence"):
        cache_of(4, 4).free(3)


PAGEMAP = Path("/proc/self/pagemap")


def resident(*tensors: torch.Tensor) -> int:
    """Bytes of the system's pages that the tensors touch and that hold memory."""
    page, total = mmap.PAGESIZE, 0
    for tensor in tensors:
        first, end = tensor.data_ptr() // page, -(-(tensor.data_ptr() + tensor.nbytes) // page)
        with PAGEMAP.open("rb") as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * (end - first)), np.uint64)
        assert len(entries) == end - first
        total += int(np.count_nonzero(entries >> np.uint64(62))) * page  # bits 63, 62: present, swapped out
    return total


@pytest.mark.skipif(not PAGEMAP.exists(), reason="needs Linux's table of the pages that are present")
def test_memory_follows_the_tokens_not_the_pool() -> None:
    cache = PagedKvCache(4, 16384, 32, 8, 64)  # 8 GiB
    assert cache.keys.numel() * 4 == 4 << 30
    assert resident(cache.keys, cache.values) < 8 << 20
    step = cache.reserve([0], [1000])
    rows = torch.zeros(1000, 8, 64)
    for layer in range(4):
        with use_backend("sdpa"):
            cache.append(layer, step, rows, rows)
    written = 8 * rows.numel() * 4  # 16 MiB
    # Each layer's keys and values begin in the middle of a huge page.
    assert written <= resident(cache.keys, cache.values) < written + 8 * (2 << 21)


def test_impossible_caches_are_refused() -> None:
    with pytest.raises(
        CacheFull, match=r"of 1099511627776 tokens needs 65536.0 GiB, which cannot be allocated"
    ):
        cache_of(1 << 40, 1)


def grown(lengths: list[int], new: list[int]) -> tuple[PagedKvCache, KvStep, torch.Generator]:
    """A cache with ``lengths`` tokens present and a step of ``new`` more, those not yet written."""
    generator = torch.Generator().manual_seed(1)
    cache = cache_of(64, 4)
    seqs = list(range(len(lengths)))
    write(cache, cache.reserve(seqs, lengths), generator)
    return cache, cache.reserve(seqs, new), generator


@pytest.mark.parametrize("cuts", [[0, 11], [0, 1, 11], [0, 3, 5, 9, 11], list(range(12))])
@pytest.mark.parametrize("window", [None, (2, None)], ids=["full", "window"])
def test_row_tiles_equal_the_whole(cuts: list[int], window: tuple[int, None] | None) -> None:
    """Appending and attending tile by tile gives what the whole step gives: no tile sees a later key."""
    cache, step, generator = grown([3, 0, 6], [5, 4, 2])
    total = step.slots.shape[0]
    q = torch.randn(total, 2 * HEADS, DIM, generator=generator)
    k, v = (torch.randn(total, HEADS, DIM, generator=generator) for _ in range(2))
    with use_backend("reference"):
        cache.append(0, step, k, v)
        whole = attend(cache, 0, step, q, window=window)
        cache.keys[0].view(-1, HEADS, DIM)[step.slots] = torch.nan  # a key read too early would show
        tiles = []
        for lo, hi in pairwise(cuts):
            tile = narrow(step, lo, hi)
            cache.append(0, tile, k[lo:hi], v[lo:hi])
            tiles.append(attend(cache, 0, tile, q[lo:hi], window=window))
    torch.testing.assert_close(torch.cat(tiles), whole, rtol=0, atol=1e-6)


class SplitCache:
    """The same cache, shown in two parts: by tokens at ``at`` or by heads."""

    def __init__(self, cache: PagedKvCache, by: str, at: int) -> None:
        self.cache, self.by, self.at, self.page_size = cache, by, at, cache.page_size

    def parts(self, layer: int, step: KvStep) -> tuple[KvPart, ...]:
        (whole,) = self.cache.parts(layer, step)
        if self.by == "heads":
            return tuple(
                whole._replace(k=whole.k[:, :, h : h + 1], v=whole.v[:, :, h : h + 1], heads=slice(h, h + 1))
                for h in range(HEADS)
            )
        page = self.page_size
        zeros = torch.zeros_like(whole.seqused)
        head = whole._replace(
            block_table=whole.block_table[:, : self.at],
            seqused=whole.seqused.clamp(max=self.at * page),
            pos0=zeros,
        )
        tail = whole._replace(
            block_table=whole.block_table[:, self.at :],
            seqused=(whole.seqused - self.at * page).clamp(min=0),
            pos0=zeros + self.at * page,
        )
        return head, tail


@pytest.mark.parametrize("by", ["tokens", "heads"])
@pytest.mark.parametrize(
    "options",
    [{}, {"sinks": True}, {"alibi_slopes": True}, {"window": (3, None)}],
    ids=["plain", "sinks", "alibi", "window"],
)
def test_parts_merge_to_the_whole(by: str, options: dict) -> None:
    cache, step, generator = grown([9, 0, 14], [3, 4, 1])
    total = step.slots.shape[0]
    q = torch.randn(total, 2 * HEADS, DIM, generator=generator)
    if options.get("sinks"):
        options = {"sinks": torch.randn(2 * HEADS, generator=generator)}
    if options.get("alibi_slopes"):
        options = {"alibi_slopes": torch.rand(2 * HEADS, generator=generator)}
    write(cache, step, generator)
    with use_backend("reference"):
        whole = attend(cache, 0, step, q, **options)
        parts = attend(SplitCache(cache, by, at=2), 0, step, q, **options)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


def parts_of_heads(cache: PagedKvCache, *heads: tuple[slice, int, int]) -> Any:
    """The cache in parts, each (what it says of its heads, the first it has, one past its last)."""

    def parts(layer: int, step: KvStep) -> tuple[KvPart, ...]:
        (whole,) = cache.parts(layer, step)
        return tuple(
            whole._replace(k=whole.k[:, :, lo:hi], v=whole.v[:, :, lo:hi], heads=said)
            for said, lo, hi in heads
        )

    return SimpleNamespace(parts=parts)


def test_heads_of_parts_are_slices_of_the_caches() -> None:
    cache, step, generator = grown([9, 0, 14], [3, 4, 1])
    write(cache, step, generator)
    q = torch.randn(step.slots.shape[0], 2 * HEADS, DIM, generator=generator)
    with use_backend("reference"):
        whole = attend(cache, 0, step, q)
        parts = attend(parts_of_heads(cache, (slice(1, None), 1, HEADS), (slice(None, 1), 0, 1)), 0, step, q)
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "cuts",
    [
        [(slice(None), 0, 1), (slice(1, HEADS), 1, HEADS)],
        [(slice(0, HEADS), 0, 1), (slice(1, HEADS), 1, HEADS)],
        [(slice(None, None, -1), 0, HEADS)],
        [(slice(-1, None), 1, HEADS), (slice(0, 1), 0, 1)],
    ],
    ids=["all", "too many", "backwards", "from the end"],
)
def test_parts_that_contradict_their_heads_are_refused(cuts: list[tuple[slice, int, int]]) -> None:
    cache, step, generator = grown([9], [3])
    q = torch.randn(3, 2 * HEADS, DIM, generator=generator)
    with pytest.raises(ValueError, match=r"heads: slice\(.* of \d KV heads, the part has "):
        attend(parts_of_heads(cache, *cuts), 0, step, q)


def test_queries_go_to_parts_on_other_devices() -> None:
    """By shapes alone, to a device that has no values."""
    cache, step, _ = grown([9, 14], [3, 1])
    keys, values = cache.keys[0], cache.values[0]
    with FakeTensorMode() as fake:
        step = KvStep(*(fake.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in step))
        q, slopes, sinks = (torch.empty(s) for s in ((4, 2 * HEADS, DIM), (2 * HEADS,), (2 * HEADS,)))
        tensors = fake.from_tensor(keys), fake.from_tensor(values), step.block_table
        here, elsewhere = (
            KvPart(*(t.to(device) for t in (*tensors, step.seqused, step.seqused)))
            for device in ("cpu", "meta")
        )
        for parts in ((here, elsewhere), (elsewhere,)):
            shown = SimpleNamespace(parts=lambda *_: parts)  # noqa: B023
            out = attend(shown, 0, step, q, alibi_slopes=slopes, sinks=sinks)
            assert (out.device, out.shape) == (q.device, q.shape)


def test_lengths_have_versions_in_inference_mode() -> None:
    """By which a backend that reads them back does so once, and not on each layer."""
    with torch.inference_mode():
        step = cache_of(4, 2).reserve([0, 1], [3, 1])
        tensors = (step.cu_seqlens, step.positions, step.slots, step.seqused, step.block_table)
    assert not any(t.is_inference() for t in tensors)
