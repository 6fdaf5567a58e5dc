"""Split-KV decode: pieces and their merge, packed heads, pages of any size, launches that outlive lengths."""

from __future__ import annotations

import pytest
import torch

from ..api.cases import Case, int32
from .calls import assert_matches, check, device_args

pytestmark = [pytest.mark.emulate("triton"), pytest.mark.toolchain, pytest.mark.gpu]


def decode_case(
    lengths: list[int], heads: int, kv_heads: int, page: int = 0, queries: int = 1, dim: int = 16
) -> Case:
    """New tokens at the end of caches that hold NaN where nothing was written."""
    g = torch.Generator().manual_seed(sum(lengths) + heads)
    batch, longest = len(lengths), max(lengths)
    q = torch.randn(batch, queries, heads, dim, generator=g).half()
    options = {"causal": True, "return_lse": True, "cache_seqlens": int32(lengths)}
    if not page:
        k, v = (torch.randn(batch, longest, kv_heads, dim, generator=g).half() for _ in range(2))
        for b, n in enumerate(lengths):
            k[b, n:] = v[b, n:] = torch.nan
        return Case(q, k, v, options)
    each = -(-longest // page)
    order = torch.randperm(batch * each, generator=g).int().view(batch, each)
    k, v = (torch.full((batch * each, page, kv_heads, dim), torch.nan).half() for _ in range(2))
    for b, n in enumerate(lengths):
        for t in (k, v):
            rows = torch.randn(n, kv_heads, dim, generator=g).half()
            for first in range(0, n, page):
                piece = rows[first : first + page]
                t[int(order[b, first // page]), : len(piece)] = piece
    return Case(q, k, v, options | {"block_table": order})


@pytest.mark.parametrize("page", [1, 7, 16, 128, 256])
def test_pages(page: int) -> None:
    check(decode_case([300, 1, 77], 4, 1, page))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (5, 1), (14, 2), (64, 1)])
def test_groups(heads: int, kv_heads: int) -> None:
    check(decode_case([130, 40], heads, kv_heads))


@pytest.mark.parametrize("queries", [2, 5])
def test_several_new_tokens(queries: int) -> None:
    """Speculative decoding: query r of a group's head h is row (r, h) of one program, causal among them."""
    check(decode_case([90, 33], 6, 2, 16, queries))


def test_empty_and_short_sequences() -> None:
    """A sequence with fewer keys than pieces, and one without any: 0 and -inf, or the sink's logit."""
    case = decode_case([0, 3, 200], 4, 2)
    check(case)
    check(case._replace(options=case.options | {"sinks": torch.tensor([0.0, 1.0, -2.0, 30.0])}))


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sink_that_takes_nothing(splits: int) -> None:
    """With a logit of -inf it is as none: 0 and -inf where no key is visible, not NaN."""
    from fastattn.triton_ops.attention import run
    from fastattn.triton_ops.plan import Plan
    from fastattn.triton_ops.tiles import Tile

    case = decode_case([0, 3, 50], 4, 2)
    case = case._replace(options=case.options | {"sinks": torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0])})
    out, lse = run(device_args(case), Plan(Tile(16, 16, 4, 2), pack=True, splits=splits))
    assert_matches(case, out, lse)
    assert lse[0, 0] == -torch.inf
    assert not out[0, :, 0].any()


@pytest.mark.parametrize("splits", [2, 5, 64])
def test_pieces_merge_to_the_whole(splits: int) -> None:
    from fastattn.triton_ops.attention import run
    from fastattn.triton_ops.plan import Plan
    from fastattn.triton_ops.tiles import Tile

    case = decode_case([150, 31], 4, 2, 16)
    a = device_args(case)
    plan = Plan(Tile(16, 16, 4, 2), pack=True, splits=splits)
    out, lse = run(a, plan)
    assert_matches(case, out, lse)
    again, lse_again = run(a, plan)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("page", [0, 16])
def test_launches_serve_other_lengths(page: int) -> None:
    """What a CUDA graph replays: the same launches, after the lengths on the device have grown."""
    from fastattn.triton_ops import launch
    from fastattn.triton_ops.attention import launches
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.plan import plan

    case = decode_case([600, 410], 4, 2, page)
    short = Case(*case[:3], case.options | {"cache_seqlens": int32([17, 300])})
    a = device_args(short)
    p = plan(a, CHIPS["H100"])
    assert p.splits > 1
    out = a.q.new_empty(a.q.shape)
    lse = a.q.new_empty((2, 4, 1), dtype=torch.float32)
    captured = launches(a, p, out, lse)
    launch.run(captured, a.q.device)
    assert_matches(short, out, lse)
    assert a.seqused_k is not None
    a.seqused_k.copy_(int32([600, 410]))
    launch.run(captured, a.q.device)
    assert_matches(case, out, lse)
