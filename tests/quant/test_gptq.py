"""GPTQ tensors: packed here, read bit by bit there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastattn.quant import gptq, words
from fastattn.quant.grouped import num_groups, trivial_g_idx
from fastattn.spec import Cut
from tests.quant import naive


def problem(bits: int, out: int, inn: int, group_size: int, seed: int) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(seed)
    groups = num_groups(inn, group_size)
    q = torch.randint(0, 1 << bits, (out, inn), generator=rng)
    scales = (torch.rand(out, groups, generator=rng) + 0.1).half()
    zero = torch.randint(0, 1 << bits, (out, groups), generator=rng)
    g_idx = trivial_g_idx(inn, group_size)[torch.randperm(inn, generator=rng)]
    return q, scales, zero, g_idx


@given(st.sampled_from(words.BITS), st.integers(1, 40), st.integers(1, 70), st.sampled_from((16, 32, -1)),
       st.sampled_from(("v1", "v2")), st.integers(0, 99))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_packs_what_the_bits_say(
    bits: int, out: int, inn: int, group_size: int, zeros: str, seed: int
) -> None:
    q, scales, zero, g_idx = problem(bits, out, inn, group_size, seed)
    packed = gptq.pack(q, scales, zero, g_idx, bits, zeros)
    expected = scales.double()[:, g_idx.long()] * (q - zero[:, g_idx.long()])
    read = naive.gptq(packed._asdict(), bits, out, inn, v1=zeros == "v1", group_size=group_size)
    assert torch.equal(read, expected)
    assert {n: tuple(t.shape) for n, t in packed._asdict().items()} == gptq.shapes(out, inn, bits, group_size)
    everything = Cut(out), Cut(inn)
    assert torch.equal(gptq.unpack_q(packed.qweight, bits, *everything).long(), q)
    assert torch.equal(gptq.unpack_zeros(packed.qzeros, bits, Cut(out), zeros).long(), zero)


@pytest.mark.parametrize("bits", words.BITS)
def test_zeros_by_words(bits: int) -> None:
    """Undoes one two's complement subtraction a word, borrows included."""
    constants = {
        2: ["01" * 16], 4: ["0001" * 8], 8: ["00000001" * 4],
        3: ["00100100100100100100100100100100", "10010010010010010010010010010010",
            "01001001001001001001001001001001"],
    }[bits]  # fmt: skip
    zero = torch.randint(0, 1 << bits, (64, 3), generator=torch.Generator().manual_seed(bits))
    true = words.pack(zero, bits, 0).t()
    stored = [
        [(int(w) - int(constants[i % len(constants)], 2) + 2**31) % 2**32 - 2**31 for i, w in enumerate(row)]
        for row in true
    ]
    read = gptq.unpack_zeros(torch.tensor(stored, dtype=torch.int32), bits, Cut(64), "words")
    assert torch.equal(read.long(), zero)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"q": torch.full((4, 32), 16)}, "values: 16..16"), ({"zero": torch.full((4, 1), -1)}, "zero: -1..-1"),
     ({"scales": torch.full((4, 1), 0.1)}, "scales: not exact"), ({"zeros": "words"}, "zeros: 'words'"),
     ({"bits": 5}, "bits: 5"), ({"g_idx": torch.full((32,), 1)}, "g_idx: 1..1, expected 0..0"),
     ({"g_idx": torch.zeros(31)}, r"g_idx: shape \(31,\)"), ({"zero": torch.zeros(4, 2)}, "zero: shape")],
    ids=["q", "zero", "scales", "zeros", "bits", "groups", "g_idx", "shape"],
)  # fmt: skip
def test_refuses(change: dict[str, object], reason: str) -> None:
    good = {"q": torch.zeros(4, 32), "scales": torch.ones(4, 1), "zero": torch.zeros(4, 1).int(),
            "g_idx": torch.zeros(32).int(), "bits": 4}  # fmt: skip
    gptq.pack(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=reason):
        gptq.pack(**(good | change))  # type: ignore[arg-type]


def test_unknown_zeros() -> None:
    with pytest.raises(ValueError, match="zeros: 'v3', expected one of v2, v1, words"):
        gptq.unpack_zeros(torch.zeros(1, 1, dtype=torch.int32), 4, Cut(8), "v3")
