"""Packing into 32-bit words against bits read one by one, and every way to cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.quant import words
from fastattn.spec import Cut
from tests.quant.naive import stream


def random(bits: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(words.BITS), st.integers(0, 100), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_packs_and_unpacks(bits: int, n: int, others: int, seed: int) -> None:
    for axis in (0, 1):
        values = random(bits, (n, others) if axis == 0 else (others, n), seed)
        packed = words.pack(values, bits, axis)
        assert packed.dtype == torch.int32
        assert packed.shape[axis] == words.num_words(n, bits)
        assert torch.equal(words.unpack(packed, bits, n, axis).long(), values)
        for i in range(others):
            found = packed.select(1 - axis, i).tolist()
            assert stream(found, bits, n) == values.select(1 - axis, i).tolist()


@given(st.data(), st.sampled_from(words.BITS), st.integers(1, 100), st.booleans())
@settings(max_examples=100, deadline=None)
def test_cuts(data: st.DataObject, bits: int, n: int, ordered: bool) -> None:
    values = random(bits, (n, 3), n)
    packed = words.pack(values, bits, 0)
    if ordered:
        order = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=40)), dtype=torch.int64)
        cut, expected = Cut(n, order=order), values[order]
    else:
        edges = st.tuples(st.integers(0, n), st.integers(0, n)).map(lambda e: (min(e), max(e)))
        spans = tuple(data.draw(st.lists(edges, max_size=3)))
        cut = Cut(n, spans)
        expected = torch.cat([values[lo:hi] for lo, hi in spans or ((0, n),)])
    assert torch.equal(words.unpack_cut(packed, bits, cut, 0).long(), expected)
    assert torch.equal(words.unpack_cut(packed.t(), bits, cut, 1).long(), expected.t())


@pytest.mark.parametrize(("bits", "reason"), [(5, "bits: 5, expected one of 2, 3"), (4, "values: 0..16")])
def test_refuses(bits: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        words.pack(torch.tensor([[0, 16]]), bits, 1)


def test_refuses_too_few_words() -> None:
    with pytest.raises(ValueError, match="words: 1, 9 values of 4 bits take 2"):
        words.unpack(torch.zeros(1, 2, dtype=torch.int32), 4, 9, 0)
