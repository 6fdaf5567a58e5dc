"""The layouts of quant/packed.py: exact round trips, cuts anywhere, clear errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn import reference_ops
from fastattn.quant import packed
from fastattn.spec import PackedWeight

from .weights import make, same


@st.composite
def weights(draw: st.DrawFn) -> PackedWeight:
    fmt = draw(st.sampled_from(["int4", "int8", "float32", "bfloat16"]))
    out = draw(st.integers(1, 6))
    inn = draw(st.integers(1, 5)) * 32 if fmt == "int4" else draw(st.integers(1, 150))
    group = draw(st.sampled_from([16, 32, 48, 64, 128]))
    return make(
        fmt, out, inn,
        seed=draw(st.integers(0, 1000)),
        group=group,
        offset=draw(st.integers(0, group - 1)),
        scale_dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        mins=draw(st.booleans()),
        g_idx=draw(st.booleans()),
        x_perm=draw(st.booleans()),
        bias=draw(st.sampled_from([None, torch.float32, torch.float16])),
    )  # fmt: skip


@given(weights())
def test_dequantize_is_the_layouts_definition(w):
    exact = reference_ops.matrix(w)
    assert same(w, exact)
    assert packed.check(w) is w
    ids = torch.tensor([w.shape[0] - 1, 0, 0])
    assert torch.equal(packed.rows(w, ids, torch.float64), exact[ids])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        near = packed.dequantize(w, dtype)
        assert near.dtype == dtype
        limit = 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (near.double() - exact).abs().max() <= limit


@given(weights(), st.data())
def test_slices_of_columns_are_exact(w, data):
    exact, inn = reference_ops.matrix(w), w.shape[1]
    lo = data.draw(st.integers(0, inn))
    hi = data.draw(st.integers(lo, inn))
    piece = packed.check(packed.slice_in(w, lo, hi))
    assert piece.bias is None
    assert same(piece, exact[:, lo:hi])
    assert torch.equal(reference_ops.matrix(piece), exact[:, lo:hi])
    if (hi - lo) % 32 == 0:
        assert piece.format == w.format
    a = data.draw(st.integers(0, hi - lo))
    b = data.draw(st.integers(a, hi - lo))
    assert same(packed.slice_in(piece, a, b), exact[:, lo + a : lo + b])


@given(weights(), st.data())
def test_rows_cut_and_joined_again_are_the_same(w, data):
    exact, out = reference_ops.matrix(w), w.shape[0]
    cuts = sorted(data.draw(st.lists(st.integers(0, out), max_size=4)))
    spans = list(zip([0, *cuts], [*cuts, out], strict=True))
    parts = [packed.check(packed.slice_out(w, lo, hi)) for lo, hi in spans]
    for part, (lo, hi) in zip(parts, spans, strict=True):
        assert same(part, exact[lo:hi])
    joined = packed.check(packed.concat_out(parts))
    assert same(joined, exact)
    assert joined.shape == w.shape
    if w.bias is not None:
        assert torch.equal(joined.bias, w.bias)


def test_a_cut_at_chunk_boundaries_shares_memory():
    w = make("int4", 4, 256, group=64)
    piece = packed.slice_in(w, 96, 224)
    assert piece.group_offset == 32
    assert (
        piece.tensors["codes"].untyped_storage().data_ptr() == w.tensors["codes"].untyped_storage().data_ptr()
    )


def test_the_nibble_order():
    q = torch.arange(32, dtype=torch.uint8)[None] % 16
    q[0, 16] = 9
    w = packed.pack_int4(q, torch.ones(1, 1), torch.zeros(1, 1), 32)
    assert w.tensors["codes"][0, 0] == 0x90
    assert w.tensors["codes"][0, 5] == 0x55


def test_joining_fills_a_missing_bias_with_zeros():
    a, b = make("int8", 3, 40, bias=torch.float32), make("int8", 2, 40)
    joined = packed.concat_out([b, a])
    assert torch.equal(joined.bias, torch.cat([torch.zeros(2), a.bias]))


BASE = make("int4", 4, 64)
OTHERS = {
    "format": make("int8", 4, 64),
    "in": make("int4", 4, 96),
    "group_size": make("int4", 4, 64, group=64),
    "group_offset": make("int4", 4, 64, offset=16),
    "tensors": make("int4", 4, 64, scale_dtype=torch.float32),
    "g_idx": make("int4", 4, 64, g_idx=True),
    "x_perm": make("int4", 4, 64, x_perm=True),
}


@pytest.mark.parametrize("what", OTHERS)
def test_weights_that_are_stored_differently_do_not_join(what):
    with pytest.raises(ValueError, match=rf"parts\[1\]: {what}"):
        packed.concat_out([BASE, OTHERS[what]])
    with pytest.raises(ValueError, match="parts: empty"):
        packed.concat_out([])


def with_tensor(**changed: torch.Tensor) -> PackedWeight:
    return BASE._replace(tensors={**BASE.tensors, **changed})


BAD = {
    "format": BASE._replace(format="int3"),
    "tensors: int4 lacks mins": BASE._replace(tensors={k: v for k, v in BASE.tensors.items() if k != "mins"}),
    "shape: 60 columns": BASE._replace(shape=(4, 60)),
    "codes: shape": BASE._replace(shape=(5, 64)),
    "codes: torch.int8": BASE._replace(
        tensors={**BASE.tensors, "codes": BASE.tensors["codes"].view(torch.int8)}
    ),
    "scales: shape": BASE._replace(group_size=64),
    "scales: torch.bfloat16": BASE._replace(
        tensors={**BASE.tensors, "scales": BASE.tensors["scales"].bfloat16()}
    ),
    "mins: torch.float32": with_tensor(mins=BASE.tensors["mins"].float()),
    "group_size: 8": BASE._replace(group_size=8),
    "group_offset: 32": BASE._replace(group_offset=32),
    "g_idx: torch.int64": BASE._replace(g_idx=torch.zeros(64, dtype=torch.int64)),
    "g_idx: values 0..2": BASE._replace(g_idx=torch.tensor([0, 2] * 32, dtype=torch.int32)),
    "x_perm: expected a permutation": BASE._replace(x_perm=torch.zeros(64, dtype=torch.int64)),
    "bias: shape": BASE._replace(bias=torch.zeros(5)),
}


@pytest.mark.parametrize("match", BAD)
def test_check_names_the_field(match):
    with pytest.raises(ValueError, match=f"^{match}"):
        packed.check(BAD[match])


def test_building_refuses_what_does_not_fit():
    one = torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"q: values 0\.\.16, expected 0\.\.15"):
        packed.pack_int4(torch.arange(32)[None].clamp(max=16), one, one, 32)
    with pytest.raises(ValueError, match="q: 40 columns, int4 needs a multiple of 32"):
        packed.pack_int4(torch.zeros(1, 40), one, one, 64)
    with pytest.raises(ValueError, match=r"q: values 0\.\.128"):
        packed.pack_int8(torch.arange(129)[None], torch.ones(1, 9), None, 16)
    with pytest.raises(ValueError, match="q: 1 dimensions"):
        packed.pack_int8(torch.zeros(4), one, None, 16)
    with pytest.raises(ValueError, match=r"lo, hi: 3, 2, expected 0 <= lo <= hi <= 4"):
        packed.slice_out(BASE, 3, 2)
    with pytest.raises(ValueError, match="lo, hi: 0, 65"):
        packed.slice_in(BASE, 0, 65)
