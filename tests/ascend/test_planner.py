"""The tile planner, and its model of the memories against the vendor's plans, recorded in plans.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_ops.capacity import PrefillShape, double_buffered, single_buffered
from ascend_ops.chips import CHIPS, Chip
from ascend_ops.planner import decode_tiles, edge_tiles, padded, prefill_tiles

CHIP = CHIPS["Ascend910B3"]
FIELDS = ["block_q", "block_k", "edge_k", "head_dim", "causal", "dtype", "accepted", "retried", "overflow"]
RECORDED: list[dict[str, Any]] = [
    dict(zip(FIELDS, row, strict=True))
    for row in json.loads((Path(__file__).parent / "plans.json").read_text())
]


def shape_of(point: dict[str, Any]) -> PrefillShape:
    tiles = (point["block_q"], point["block_k"], point["edge_k"])
    return PrefillShape(*tiles, point["head_dim"], point["head_dim"], edge_tiles(band=point["causal"]))


def test_verdicts_agree_with_the_vendor() -> None:
    """Fits or overflows, at the first or at the last try, and which memory: on every recorded point."""
    assert len(RECORDED) >= 200
    for point in RECORDED:
        first = double_buffered(shape_of(point)).overflows(CHIP)
        last = single_buffered(shape_of(point)).overflows(CHIP)
        assert bool(first) == point["retried"], point
        assert (not first or not last) == point["accepted"], point
        if not point["accepted"]:
            assert last.keys() == point["overflow"].keys(), point


def test_prediction_error_in_bytes() -> None:
    """What the vendor says that a refused tile needs, against the model: exact but for a few points."""
    errors = [
        abs(single_buffered(shape_of(point)).overflows(CHIP)[memory][0] - needed)
        for point in RECORDED
        for memory, (needed, _) in point["overflow"].items()
    ]
    assert len(errors) > 100
    assert sum(error == 0 for error in errors) / len(errors) > 0.98


@pytest.mark.parametrize(
    ("head_dim", "tiles"), [(64, (128, 512, 128)), (128, (128, 256, 128)), (256, (64, 256, 128))]
)
def test_causal_tiles(head_dim: int, tiles: tuple[int, int, int]) -> None:
    """docs/ascend.md names these: 65536, 32768 and 16384 scores a crossing."""
    for chip in CHIPS.values():
        assert prefill_tiles(chip, head_dim, head_dim) == tiles


def test_no_larger_tile_fits() -> None:
    """Twice the queries or twice the keys overflow something."""
    for head_dim in (64, 128, 256):
        best = prefill_tiles(CHIP, head_dim, head_dim)
        for more in (best._replace(block_q=2 * best.block_q), best._replace(block_k=2 * best.block_k)):
            assert double_buffered(PrefillShape(*more, head_dim, head_dim, 2.0)).overflows(CHIP), more


@given(
    head_dim=st.integers(1, 256),
    v_head_dim=st.integers(1, 256),
    page=st.one_of(st.just(0), st.integers(1, 1024)),
    band=st.booleans(),
    mask_bytes=st.sampled_from((0, 1, 2, 4)),
    alibi=st.booleans(),
    softcap=st.booleans(),
    rows=st.integers(1, 64),
    chip=st.sampled_from(sorted(CHIPS.values())),
)
def test_every_call_gets_tiles(
    head_dim: int,
    v_head_dim: int,
    page: int,
    band: bool,
    mask_bytes: int,
    alibi: bool,
    softcap: bool,
    rows: int,
    chip: Chip,
) -> None:
    edge = edge_tiles(band=band, mask_bytes=mask_bytes, alibi=alibi, softcap=softcap)
    biased = bool(mask_bytes) or alibi
    tiles = prefill_tiles(chip, head_dim, v_head_dim, page, edge=edge, biased=biased, softcap=softcap)
    shape = PrefillShape(*tiles, padded(head_dim), padded(v_head_dim), edge, softcap)
    assert not double_buffered(shape).overflows(chip)
    decode = decode_tiles(chip, head_dim, v_head_dim, rows, page, biased=biased)
    assert decode.block_r >= rows
    for size in (*tiles, *decode):
        assert size & (size - 1) == 0
    if page:
        assert page % tiles.edge_k == page % tiles.block_k == page % decode.block_k == 0
    assert tiles.block_k % tiles.edge_k == 0


def test_a_smaller_memory_gets_smaller_tiles() -> None:
    """The plan follows the chip's description, whichever memory is short."""
    whole = prefill_tiles(CHIP, 128, 128)
    for memory in ("ub", "l1", "l0c"):
        small = CHIP._replace(**{memory: getattr(CHIP, memory) // 4})
        tiles = prefill_tiles(small, 128, 128)
        assert tiles.block_q * tiles.block_k < whole.block_q * whole.block_k, memory
