"""Every format on disk, cut in every way: what `packed` holds equals the bits read one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.quant import grouped, packed
from fastattn.spec import Cut
from tests.quant.stored import SPECS, Spec, Stored, store

OUT, IN = 24, 192
CUTS = {
    "whole": Cut(IN),
    "group": Cut(IN, ((32, 128),)),
    "inside": Cut(IN, ((8, 77),)),
    "spans": Cut(IN, ((64, 96), (0, 32))),
    "order": Cut(IN, order=torch.randperm(IN, generator=torch.Generator().manual_seed(0))[:100]),
    "empty": Cut(IN, ((5, 5),)),
}


def index(cut: Cut) -> torch.Tensor:
    if cut.order is not None:
        return cut.order
    return torch.cat([torch.arange(lo, hi) for lo, hi in cut.spans or ((0, cut.size),)])


def check(stored: Stored, out: Cut, inn: Cut) -> None:
    piece = grouped.pack(stored.format.read(stored.tensors, out, inn))
    packed.check(piece)
    expected = stored.values[index(out)][:, index(inn)]
    assert piece.shape == tuple(expected.shape)
    assert all(t.is_contiguous() for t in piece.tensors.values())
    assert torch.equal(packed.dequantize(piece, torch.float64), expected)
    groups = (
        stored.tensors["weight_scale"].shape[1]
        if "weight_scale" in stored.tensors
        else len(stored.tensors["scales"])
    )
    assert piece.tensors["scales"].shape[1] <= min(groups, max(piece.shape[1], 1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_cuts(spec: Spec) -> None:
    stored = store(spec, OUT, IN, seed=1)
    for inn in CUTS.values():
        check(stored, Cut(OUT), inn)
        check(stored, Cut(OUT, ((16, 24), (3, 5))), inn)
        check(stored, Cut(OUT, order=torch.tensor([23, 0, 7, 7])), inn)


@given(st.sampled_from(SPECS), st.integers(1, 5), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_odd_sizes(spec: Spec, eights: int, inn: int, seed: int) -> None:
    out = 8 * eights if spec.kind == "awq" else eights
    check(store(spec, out, 7 * inn, seed), Cut(out), Cut(7 * inn))


@pytest.mark.parametrize("spec", [s for s in SPECS if s.act_order and s.group_size > 0], ids=str)
@pytest.mark.parametrize("span", [(0, 96), (96, 192), (40, 103)], ids=str)
def test_sorted_columns_are_contiguous_groups(spec: Spec, span: tuple[int, int]) -> None:
    """Cut in the order of Algorithm 1, act-order is gone: no x_perm, no g_idx, only this piece's scales."""
    stored = store(spec, OUT, IN, seed=2)
    g_idx = stored.format.g_idx(stored.tensors, IN)
    assert g_idx is not None
    order = grouped.sorted_columns(g_idx)[slice(*span)]
    piece = grouped.pack(stored.format.read(stored.tensors, Cut(OUT), Cut(IN, order=order)))
    assert piece.x_perm is None
    assert piece.g_idx is None
    lo, hi = span
    used = -(-hi // spec.group_size) - lo // spec.group_size
    assert piece.group_offset == (lo % spec.group_size if used > 1 else 0)
    assert piece.tensors["scales"].shape == (OUT, used)
    assert torch.equal(packed.dequantize(piece, torch.float64), stored.values[:, order])


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([16, 32, 128]), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_lanes_of_a_piece_meet_few_groups(chunks: int, ranks: int, group_size: int, seed: int) -> None:
    """Only the last columns of each group, fewer than a lane, share lanes with other groups."""
    n = 32 * chunks * ranks
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: 32 * chunks]
    groups = (torch.arange(n) // group_size)[shuffled]
    order = grouped.order_of_lanes(groups)
    assert torch.equal(order.sort().values, torch.arange(groups.numel()))
    lanes = groups[order].view(-1, 2, 4, 4).transpose(1, 2).reshape(-1, 8)
    mixed = int((lanes != lanes[:, :1]).any(1).sum())
    rest = sum(int(n) % 8 for n in torch.bincount(groups))
    assert 8 * mixed <= rest


def test_layouts() -> None:
    """4 bits are int4 with 16-bit scales where that is exact, 8 symmetric bits need no mins."""
    four = store(Spec("gptq"), 8, 64, 0)
    w = grouped.pack(four.format.read(four.tensors, Cut(8), Cut(64)))
    assert (w.format, w.tensors["scales"].dtype, w.group_size) == ("int4", torch.float16, 32)
    eight = store(Spec("gptq", 8), 8, 64, 0)
    w = grouped.pack(eight.format.read(eight.tensors, Cut(8), Cut(64)))
    assert w.format == "int8"
    assert "mins" not in w.tensors
    wide = store(Spec("gptq", symmetric=False), 8, 64, 0)
    w = grouped.pack(wide.format.read(wide.tensors, Cut(8), Cut(64)))
    assert w.tensors["mins"].dtype == torch.float32, "scale * zero takes up to 15 bits"


@pytest.mark.parametrize(
    ("g_idx", "act_order", "reason"),
    [([0, 0, 1, 1], False, None), ([1, 0, 1, 0], True, None), ([1, 0, 1, 0], False, "no act-order"),
     ([0, 0, 0, 1], True, "puts 3 columns into group 0, expected 2"), ([0, 2, 1, 1], True, r"0\.\.2"),
     ([0, -1, 1, 1], True, r"-1\.\.1")],
    ids=["trivial", "shuffled", "unexpected", "uneven", "high", "low"],
)  # fmt: skip
def test_g_idx(g_idx: list[int], act_order: bool, reason: str | None) -> None:
    t = torch.tensor(g_idx, dtype=torch.int32)
    if reason is None:
        found = grouped.check_g_idx(t, 2, act_order)
        assert (found is None) == (g_idx == sorted(g_idx))
    else:
        with pytest.raises(ValueError, match=reason):
            grouped.check_g_idx(t, 2, act_order)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_not_finite(value: float) -> None:
    stored = store(Spec("gptq"), 8, 64, 0)
    stored.tensors["scales"][1, 3] = value
    with pytest.raises(ValueError, match="scales: not finite"):
        grouped.pack(stored.format.read(stored.tensors, Cut(8), Cut(64)))


def test_weight_shape_is_checked() -> None:
    stored = store(Spec("compressed-tensors"), 8, 64, 0)
    stored.tensors["weight_shape"][0] = 9
    with pytest.raises(ValueError, match=r"weight_shape: \[9, 64\], expected \[8, 64\]"):
        stored.format.read(stored.tensors, Cut(8), Cut(64))
