"""KV append with rotary embedding against float64, in the emulator."""

from __future__ import annotations

import re

import pytest
import torch

from cuda_volta.append import append_kv
from fastattn import reference_ops
from fastattn.spec import AppendKvArgs
from tests.ops.runners import random
from tests.ops.test_rotary_append import CACHES, angles

pytestmark = pytest.mark.toolchain
HALF = torch.float16


def run(a: AppendKvArgs) -> None:
    append_kv(
        *a[:5], **{n: getattr(a, n) for n in ("cos", "sin", "positions", "interleaved", "k_scale", "v_scale")}
    )


def check(a: AppendKvArgs) -> None:
    """Values as they are move exactly; rotated or scaled ones within one rounding of the largest."""
    exact_k, exact_v = reference_ops.append_kv(a)
    before_k, before_v = a.k_cache.clone(), a.v_cache.clone()
    run(a)
    written = torch.zeros(a.k_cache.shape[:2], dtype=torch.bool)
    slots = a.slots[(a.slots >= 0) & (a.slots < written.numel())]
    written.view(-1)[slots] = True
    plain = {"k": a.cos is None and a.k_scale is None, "v": a.v_scale is None}
    for name, cache, before, exact in (
        ("k", a.k_cache, before_k, exact_k),
        ("v", a.v_cache, before_v, exact_v),
    ):
        assert torch.equal(cache[~written], before[~written])
        if plain[name]:
            assert torch.equal(cache.double(), exact)
        else:
            limit = torch.finfo(HALF).eps * float(exact[written].abs().max())
            assert float((cache.double() - exact).abs().max()) <= limit


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rotate", [None, False, True], ids=["as is", "halves", "pairs"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_append(kind, rotate, scaled):
    k_cache, v_cache = CACHES[kind](24, HALF), CACHES[kind](10, HALF)
    k_cache += 7
    v_cache += 9
    k, v = random(6, 2, 24, seed=4, dtype=HALF), random(6, 2, 10, seed=5, dtype=HALF)
    args = AppendKvArgs(k_cache, v_cache, k, v, torch.tensor([3, -1, 19, 0, 8, -5]))
    if rotate is not None:
        cos, sin = angles(16)
        args = args._replace(
            cos=cos, sin=sin, positions=torch.tensor([0, 5, 49, 3, 2, 1]), interleaved=rotate
        )
    if scaled:
        args = args._replace(k_scale=torch.tensor([0.5, 3.0]), v_scale=torch.tensor([0.1, 2.0]))
    check(args)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 7, 5, 128), (2, 64, 1, 96)], ids=str)
def test_odd_shapes_and_rows_inside_a_fused_projection(shape):
    cache = torch.zeros(2, *shape, dtype=HALF)
    rows = min(5, shape[0] * shape[1])
    fused = random(rows, 3, *shape[2:], seed=6, dtype=HALF)
    slots = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(1))[:rows]
    check(AppendKvArgs(cache[0], cache[1], fused[:, 1], fused[:, 2], slots))


def test_hostile_slots_and_positions_write_nowhere_else():
    cache = torch.zeros(2, 3, 4, 2, 8, dtype=HALF)
    rows = random(6, 2, 8, seed=7, dtype=HALF)
    slots = torch.tensor([12, 1 << 40, -(1 << 62), (1 << 63) - 1, 5, 11])
    cos, sin = angles(8)
    positions = torch.tensor([0, 0, 0, 0, 1 << 50, -7])
    run(AppendKvArgs(cache[0], cache[1], rows, rows, slots, cos, sin, positions))
    near = torch.zeros_like(cache)
    positions = torch.tensor([0, 0, 0, 0, 49, 0])
    run(AppendKvArgs(near[0], near[1], rows, rows, slots.where(slots < 12, -1), cos, sin, positions))
    assert torch.equal(cache, near)
    assert int(cache[1].flatten(0, 1).any(-1).any(-1).sum()) == 2


def test_nothing_to_append():
    cache = random(2, 4, 1, 8, seed=6, dtype=HALF)
    before = cache.clone()
    for slots in ([], [-1, -2]):
        rows = torch.ones(len(slots), 1, 8, dtype=HALF)
        run(AppendKvArgs(cache, cache, rows, rows, torch.tensor(slots, dtype=torch.int64)))
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("k_cache: torch.float32, expected torch.float16", {"k_cache": torch.zeros(5, 4, 2, 8)}),
        (
            "k: torch.float16 (2, 2, 8), expected torch.float16 (2, 3, 8)",
            {"k_cache": torch.zeros(5, 4, 3, 8, dtype=HALF)},
        ),
        (
            "v_cache: torch.float16 (5, 2, 2, 8), expected torch.float16 (5, 4, 2, -1)",
            {"v_cache": torch.zeros(5, 2, 2, 8, dtype=HALF)},
        ),
        ("slots: torch.int32 (2,), expected torch.int64", {"slots": torch.tensor([0, 1], dtype=torch.int32)}),
        ("v: torch.bfloat16, expected torch.float16; Volta", {"v": torch.ones(2, 2, 8).bfloat16()}),
        ("k_scale: torch.float32 (1,), expected", {"k_scale": torch.ones(1)}),
        ("v_scale: torch.float32 (2, 1), expected", {"v_scale": torch.ones(2, 1)}),
    ],
)
def test_bad_arguments_are_named(message, change):
    rows, cache = torch.ones(2, 2, 8, dtype=HALF), torch.zeros(2, 5, 4, 2, 8, dtype=HALF)
    args = AppendKvArgs(cache[0], cache[1], rows, rows, torch.tensor([0, 1]))._replace(**change)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        run(args)
    assert not cache.any()
