"""Rotary embedding and KV append of every backend and instruction set against float64."""

from __future__ import annotations

import pytest
import torch

from fastattn import reference_ops
from fastattn.backends import cpu_ops, torch_ops
from fastattn.spec import AppendKvArgs, RotaryArgs

from .runners import FLOATS, assert_accurate, random, run

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
STYLES = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])

SHAPES = [
    *(((1, 1, 2), 2), ((5, 3, 64), 64), ((7, 2, 66), 66), ((3, 4, 80), 20), ((2, 9, 128), 34)),
    *(((4, 1, 256), 256), ((0, 3, 64), 64), ((300, 4, 64), 64), ((3, 2, 7), 6), ((3, 2, 8), 0)),
]


def angles(rotary_dim: int, positions: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    rates = 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / max(rotary_dim, 1))
    phase = torch.arange(positions).double()[:, None] * rates
    return phase.cos().float(), phase.sin().float()


def plain_rotary(x, cos, sin, positions, interleaved):
    """The usual torch formula, in x's own dtype."""
    c, s = (t[positions].to(x.dtype)[:, None] for t in (cos, sin))
    r = 2 * cos.shape[1]
    first, second = (x[..., 0:r:2], x[..., 1:r:2]) if interleaved else x[..., :r].chunk(2, -1)
    turned = (first * c - second * s, second * c + first * s)
    out = x.clone()
    out[..., :r] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return out


@DTYPES
@STYLES
@pytest.mark.parametrize(("shape", "rotary_dim"), SHAPES, ids=str)
def test_rotary(ops, dtype, interleaved, shape, rotary_dim):
    x = random(*shape, seed=1, dtype=dtype)
    cos, sin = angles(rotary_dim)
    positions = torch.randint(0, 50, (shape[0],), generator=torch.Generator().manual_seed(2))
    args = RotaryArgs(x, cos, sin, positions, interleaved)
    ours = run(ops, "rotary", args)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    exact = reference_ops.rotary(args)
    assert_accurate(ours, plain_rotary(x, cos, sin, positions, interleaved), exact)
    assert torch.equal(ours[..., rotary_dim:], x[..., rotary_dim:])


@STYLES
def test_rotary_of_heads_inside_a_fused_projection(ops, interleaved):
    fused = random(6, 3 * 32 + 16, seed=3)
    x = fused[:, 16:].view(6, 3, 32)
    cos, sin = angles(32)
    args = RotaryArgs(x, cos, sin, torch.arange(6), interleaved)
    assert torch.equal(run(ops, "rotary", args), run(ops, "rotary", args._replace(x=x.contiguous())))
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(run(ops, "rotary", args), run(ops, "rotary", args._replace(x=transposed)))


CACHES = {
    "pages": lambda d, dt: torch.zeros(5, 4, 2, d, dtype=dt),
    "heads first": lambda d, dt: torch.zeros(5, 2, 4, d, dtype=dt).transpose(1, 2),
    "every other page": lambda d, dt: torch.zeros(10, 4, 2, d, dtype=dt)[::2],
    "inside both": lambda d, dt: torch.zeros(5, 4, 2, 2, d, dtype=dt)[:, :, 1],
}


@DTYPES
@pytest.mark.parametrize("cache_dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("rotate", [None, False, True], ids=["as is", "halves", "pairs"])
def test_append(ops, dtype, cache_dtype, kind, rotate):
    k_cache, v_cache = CACHES[kind](24, cache_dtype), CACHES[kind](10, cache_dtype)
    k_cache += 7
    v_cache += 9
    k, v = random(6, 2, 24, seed=4, dtype=dtype), random(6, 2, 10, seed=5, dtype=dtype)
    slots = torch.tensor([3, -1, 19, 0, 8, -5])
    args = AppendKvArgs(k_cache, v_cache, k, v, slots)
    if rotate is not None:
        cos, sin = angles(16)
        args = args._replace(
            cos=cos, sin=sin, positions=torch.tensor([0, 5, 49, 3, 2, 1]), interleaved=rotate
        )
    exact_k, exact_v = reference_ops.append_kv(args)
    run(ops, "append_kv", args)
    assert torch.equal(v_cache.double(), exact_v.to(cache_dtype).double())
    if rotate is None:
        assert torch.equal(k_cache.double(), exact_k.to(cache_dtype).double())
    else:
        narrow = max(dtype, cache_dtype, key=lambda d: torch.finfo(d).eps)
        limit = torch.finfo(narrow).eps * float(exact_k.abs().max())
        assert float((k_cache.double() - exact_k).abs().max()) <= limit
        untouched = [s for s in range(20) if s not in slots.tolist()]
        assert (k_cache.reshape(20, 2, 24)[untouched] == 7).all()


def test_append_of_nothing_changes_nothing(ops):
    cache = random(2, 4, 1, 8, seed=6)
    before = cache.clone()
    for slots in ([], [-1, -2]):
        rows = torch.ones(len(slots), 1, 8)
        args = AppendKvArgs(cache, cache, rows, rows, torch.tensor(slots, dtype=torch.int64))
        run(ops, "append_kv", args)
    assert torch.equal(cache, before)


def test_append_of_many_rows_on_threads(ops):
    caches = torch.zeros(2, 40, 16, 3, 64)
    k, v = random(600, 3, 64, seed=7), random(600, 3, 64, seed=8)
    slots = torch.randperm(640, generator=torch.Generator().manual_seed(9))[:600]
    args = AppendKvArgs(caches[0], caches[1], k, v, slots)
    run(ops, "append_kv", args)
    assert torch.equal(caches[0].flatten(0, 1)[slots], k)
    assert torch.equal(caches[1].flatten(0, 1)[slots], v)


@pytest.mark.parametrize("slot", [20, 1 << 40])
def test_a_slot_past_the_cache_is_refused_before_anything_is_written(ops, slot):
    cache = torch.zeros(5, 4, 2, 8)
    rows = torch.ones(2, 2, 8)
    args = AppendKvArgs(cache, cache, rows, rows, torch.tensor([0, slot]))
    with pytest.raises(ValueError, match=f"slots: .*{slot}.*expected"):
        run(ops, "append_kv", args)
    assert not cache.any()


@pytest.mark.parametrize("position", [-1, 50])
def test_a_position_past_the_table_is_refused(ops, position):
    cos, sin = angles(8)
    x = torch.ones(2, 1, 8)
    with pytest.raises(ValueError, match=rf"positions: .*{position}.*expected 0"):
        run(ops, "rotary", RotaryArgs(x, cos, sin, torch.tensor([0, position])))
    cache = torch.zeros(5, 4, 1, 8)
    args = AppendKvArgs(cache, cache, x, x, torch.tensor([0, 1]), cos, sin, torch.tensor([0, position]))
    with pytest.raises(ValueError, match=rf"positions: .*{position}.*expected 0"):
        run(ops, "append_kv", args)
    assert not cache.any()


def test_scaled_caches_are_plain_torch():
    k_cache, v_cache = torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8)
    k, v = random(3, 3, 8, seed=10), random(3, 3, 8, seed=11)
    scale = torch.tensor([0.5, 2.0, 4.0])
    args = AppendKvArgs(k_cache, v_cache, k, v, torch.tensor([0, 3, -1]), k_scale=scale, v_scale=scale)
    exact_k, exact_v = reference_ops.append_kv(args)
    run(torch_ops.OPS, "append_kv", args)
    assert torch.equal(k_cache.double(), exact_k)
    assert torch.equal(v_cache.double(), exact_v)
    assert not args.features() <= cpu_ops.OPS["append_kv"].features


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("k_cache: shape", {"k_cache": torch.zeros(5, 4, 3, 8)}),
        ("v_cache: shape", {"v_cache": torch.zeros(5, 2, 2, 8)}),
        ("slots: int32, expected int64", {"slots": torch.tensor([0, 1], dtype=torch.int32)}),
        ("slots: shape", {"slots": torch.tensor([0, 1, 2])}),
        ("v: shape", {"v": torch.ones(3, 2, 8)}),
    ],
)
def test_append_names_the_bad_argument(native_ops, match, change):
    rows = torch.ones(2, 2, 8)
    args = AppendKvArgs(torch.zeros(5, 4, 2, 8), torch.zeros(5, 4, 2, 8), rows, rows, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=match):
        run(native_ops, "append_kv", args._replace(**change))
