"""The tile planner, and its model of the memories against the vendor's plans, recorded in plans*.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_ops.capacity import PrefillShape, double_buffered, first_try, single_buffered, whole_rows
from ascend_ops.chips import CHIPS, Chip
from ascend_ops.planner import decode_tiles, edge_tiles, padded, prefill_tiles

CHIP, CHIP_950 = CHIPS["Ascend910B3"], CHIPS["Ascend950PR_9579"]
FIELDS = ["block_q", "block_k", "edge_k", "head_dim", "causal", "dtype", "accepted", "retried", "overflow"]


def recorded(name: str) -> list[dict[str, Any]]:
    rows = json.loads((Path(__file__).parent / name).read_text())
    return [dict(zip(FIELDS, row, strict=True)) for row in rows]


RECORDED, RECORDED_950 = recorded("plans.json"), recorded("plans_950.json")


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


def test_verdicts_agree_on_a_950() -> None:
    """At the first try. The model is an upper bound, but for tiles of more than twice the memory."""
    assert len(RECORDED_950) >= 133
    for point in RECORDED_950:
        needs = whole_rows(shape_of(point))
        assert bool(needs.overflows(CHIP_950)) != (point["accepted"] and not point["retried"]), point
        needed, _ = point["overflow"].get("UB", (0, 0))
        assert needs.ub >= needed or needed > 2 * CHIP_950.ub, point


@pytest.mark.parametrize(
    ("head_dim", "tiles", "tiles_950"),
    [
        (64, (128, 512, 128), (64, 256, 128)),
        (128, (128, 256, 128), (64, 256, 128)),
        (256, (64, 256, 128), (32, 512, 128)),
    ],
)
def test_causal_tiles(head_dim: int, tiles: tuple[int, int, int], tiles_950: tuple[int, int, int]) -> None:
    """docs/ascend.md names these: 65536, 32768 and 16384 scores a crossing; on a 950 16384 each."""
    for chip in CHIPS.values():
        assert prefill_tiles(chip, head_dim, head_dim) == (tiles_950 if chip.whole_rows else tiles)


def test_no_larger_tile_fits() -> None:
    """Twice the queries or twice the keys overflow something."""
    for chip in (CHIP, CHIP_950):
        for head_dim in (64, 128, 256):
            best = prefill_tiles(chip, head_dim, head_dim)
            for more in (best._replace(block_q=2 * best.block_q), best._replace(block_k=2 * best.block_k)):
                assert first_try(PrefillShape(*more, head_dim, head_dim, 2.0), chip).overflows(chip), more


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
    assert not first_try(shape, chip).overflows(chip)
    decode = decode_tiles(chip, head_dim, v_head_dim, rows, page, biased=biased)
    assert decode.block_r >= rows
    for size in (*tiles, *decode):
        assert size & (size - 1) == 0
    if page:
        assert page % tiles.edge_k == page % tiles.block_k == page % decode.block_k == 0
    assert tiles.block_k % tiles.edge_k == 0


def test_a_smaller_memory_gets_smaller_tiles() -> None:
    """The plan follows the chip's description, whichever memory is short."""
    for chip in (CHIP, CHIP_950):
        whole = prefill_tiles(chip, 128, 128)
        for memory in ("ub", "l1", "l0c"):
            small = chip._replace(**{memory: getattr(chip, memory) // (8 if chip.whole_rows else 4)})
            tiles = prefill_tiles(small, 128, 128)
            assert tiles.block_q * tiles.block_k < whole.block_q * whole.block_k, memory
