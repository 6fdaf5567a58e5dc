"""The Ascend attention kernels in Triton's interpreter, or on an NPU, against the float64 oracle.

Accuracy rule: ``err(ours) <= 2 * err(plain torch in the same dtype) + eps``.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ascend_ops.attention import attention
from ascend_ops.planner import DecodeTiles, PrefillTiles
from fastattn import reference
from fastattn.spec import AttentionArgs

from ..api.cases import HEAD_DIMS, LAYOUTS, Case, assert_accurate, int32, random_case, torch_math

pytestmark = [pytest.mark.toolchain, pytest.mark.emulate("ascend"), pytest.mark.gpu]

DTYPES = (torch.float16, torch.bfloat16)
DEVICE = torch.device("npu" if hasattr(torch, "npu") and torch.npu.is_available() else "cpu")


def run(
    args: AttentionArgs, tiles: PrefillTiles | DecodeTiles | None = None, cores: int = 3
) -> tuple[Tensor, Tensor]:
    """The kernels' (out, lse), on an NPU where there is one."""
    moved = {n: v.to(DEVICE) if isinstance(v, Tensor) else v for n, v in args._asdict().items()}
    assert moved.pop("kv_layout") == "nhd"
    out, lse = attention(**moved, tiles=tiles, cores=cores)
    return out.cpu(), lse.cpu()


def check(case: Case, tiles: PrefillTiles | DecodeTiles | None = None, cores: int = 3) -> None:
    """Asserts that the kernels' result is accurate."""
    args = case.args()
    exact, exact_lse = reference.attention(args)
    yardstick, yardstick_lse = torch_math(args)
    out, lse = run(args, tiles, cores)
    assert out.dtype == case.q.dtype
    assert_accurate(out, yardstick, exact, f"{tiles} {case}")
    if args.return_lse:
        assert lse.dtype == torch.float32
        assert_accurate(lse, yardstick_lse, exact_lse, f"lse {tiles} {case}")


def small_tiles(rng: random.Random, args: AttentionArgs) -> PrefillTiles:
    """Tiles of a few rows, so that short sequences have full blocks, both edges and several tiles."""
    edge = rng.choice((16, 32))
    while args.block_table is not None and args.k.shape[1] % edge:
        edge //= 2
    return PrefillTiles(16, edge * (1 if args.block_table is not None else 2), edge)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_calls(layout: str, dtype: torch.dtype) -> None:
    """Random subsets of all fields, under small tiles and under the planner's, which may decode."""
    rng = random.Random(f"{layout} {dtype}")  # noqa: S311
    for seed in range(2):
        case = random_case(seed, layout, dtype, rng.choice(HEAD_DIMS))
        check(case, small_tiles(rng, case.args()))
        check(case)


@given(
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    head_dim=st.integers(1, 256),
    seed=st.integers(0, 2**20),
    cores=st.integers(1, 25),
)
@settings(max_examples=24)
def test_any_call(layout: str, dtype: torch.dtype, head_dim: int, seed: int, cores: int) -> None:
    case = random_case(seed, layout, dtype, head_dim)
    check(case, small_tiles(random.Random(seed), case.args()), cores)  # noqa: S311


@given(
    window=st.tuples(*[st.one_of(st.none(), st.integers(0, 200))] * 2),
    q_len=st.integers(1, 90),
    k_len=st.integers(0, 200),
    block_q=st.sampled_from((16, 32, 64)),
    edge=st.sampled_from((16, 32, 64)),
)
@settings(max_examples=24)
def test_bands(
    window: tuple[int | None, int | None], q_len: int, k_len: int, block_q: int, edge: int
) -> None:
    """Every band, wide or narrow, in tiles of every proportion: the windows of the tiling-mask."""
    q, k = torch.randn(1, q_len, 1, 16).half(), torch.randn(1, k_len, 1, 16).half()
    options = {"window": window, "return_lse": True}
    check(Case(q, k, k.flip(1), options), PrefillTiles(block_q, 2 * edge, edge), cores=1)


@pytest.mark.parametrize("head_dim", [16, 24, 40, 64, 80, 96, 128, 160, 192, 256])
def test_head_dims(head_dim: int) -> None:
    """Under the tiles that the planner gives, prefill and decode, V's head_dim equal and other."""
    dtype = DTYPES[head_dim // 8 % 2]
    for v_dim, q_len in ((head_dim, 70), (64, 20), (head_dim, 1)):
        q, k, v = (
            torch.randn(1, n, h, d).to(dtype)
            for n, h, d in ((q_len, 4, head_dim), (300, 2, head_dim), (300, 2, v_dim))
        )
        check(Case(q, k, v, {"causal": True, "return_lse": True}))


@pytest.mark.parametrize("queries", [1, 2, 8])
@pytest.mark.parametrize("cores", [1, 5, 48])
def test_decode_splits(queries: int, cores: int) -> None:
    """Keys split over any number of cores, more than there are blocks included."""
    q = torch.randn(2, queries, 6, 64).half()
    k, v = torch.randn(2, 300, 3, 64).half(), torch.randn(2, 300, 3, 32).half()
    used = int32([300, 33])
    options = {
        "cache_seqlens": used,
        "causal": True,
        "window": (150, 0),
        "sinks": torch.randn(6),
        "return_lse": True,
    }
    check(Case(q, k, v, options), DecodeTiles(16, 32), cores)


@pytest.mark.parametrize(("page", "longest"), [(1, 40), (12, 90), (16, 100), (128, 300), (256, 300)])
def test_pages(page: int, longest: int) -> None:
    """Any page size; entries of the table past a sequence's end are garbage that nothing follows."""
    pages, lengths = -(-longest // page), (longest, longest // 8)
    table = torch.full((2, pages + 3), 2**30, dtype=torch.int32)
    order = torch.randperm(2 * pages, dtype=torch.int32).view(2, pages)
    for b, n in enumerate(lengths):
        table[b, : -(-n // page)] = order[b, : -(-n // page)]
    k, v = (torch.randn(2 * pages, page, 2, 64).half() for _ in range(2))
    for q_len in (1, 40):
        q = torch.randn(2, q_len, 4, 64).half()
        options = {"block_table": table, "cache_seqlens": int32(lengths), "cache_leftpad": int32([5, 0])}
        check(Case(q, k, v, {**options, "causal": True}))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("q_len", [1, 20])
def test_heads_far_apart(q_len: int, kv_heads: int) -> None:
    """Heads 2^30 elements from each other: past int32 from the third. Memory that nothing touches is free."""
    far, shape = 1 << 30, (1, 20, 3, 16)
    k = torch.empty(2 * far + 20 * 16, dtype=torch.float16).as_strided(shape, (0, 16, far, 1))
    mask = torch.empty(2 * far + q_len * 20, dtype=torch.bool)
    mask = mask.as_strided((1, 3, q_len, 20), (0, far, 20, 1))
    k.copy_(torch.randn(shape))
    mask.copy_(torch.rand(mask.shape) > 0.3)
    q = torch.randn(1, q_len, 3, 16).half()
    check(Case(q, k[:, :, :kv_heads], k[:, :, :kv_heads], {"attn_mask": mask, "return_lse": True}))


@pytest.mark.parametrize(
    "options", [{}, {"sinks": torch.randn(2)}, {"q_pos0": int32([7, 4, 2, 0])}], ids=list
)
@pytest.mark.parametrize("tiles", [None, PrefillTiles(16, 16, 16)], ids=["planned", "prefill"])
@pytest.mark.parametrize(
    ("rows", "ends"), [(3, [0, 1]), (4, [0, 1, 3]), (4, [0, 2, 3]), (2, [0, 1, 1]), (8, [0, 0, 2, 3, 3])]
)
def test_rows_of_no_sequence(
    rows: int, ends: list[int], tiles: PrefillTiles | None, options: dict[str, Tensor]
) -> None:
    """Packed queries that fill the tensor only if all sequences were as long as the longest may be."""
    batch = len(ends) - 1
    q, k = torch.randn(rows, 2, 16).half(), torch.randn(10 * batch, 2, 16).half()
    options = {n: t[:batch] if n == "q_pos0" else t for n, t in options.items()}
    keys = int32(range(0, 10 * batch + 1, 10))
    lengths = {"cu_seqlens_q": int32(ends), "cu_seqlens_k": keys, "max_seqlen_q": rows // batch}
    case = Case(q, k, k.flip(0), {**lengths, "causal": True, "return_lse": True, **options})
    check(case, tiles)
    out, lse = run(case.args(), tiles)
    assert not out[ends[-1] :].any()
    assert (lse[:, ends[-1] :] == -torch.inf).all()


def test_wild_indices_read_nothing_outside() -> None:
    """Indices on a device are clamped: the answer is another one, the reads stay inside the tensors."""
    q, k = torch.randn(2, 3, 2, 16).half(), torch.randn(4, 16, 2, 16).half()
    table, lengths, far = int32([[0, 1], [2, 3]]), int32([30, 16]), 2**30
    paged = Case(q, k, k, {"block_table": table, "cache_seqlens": lengths}).args()
    rows = Case(q, k, k, {"cache_batch_idx": int32([0, 1])}).args()
    ends = {"cu_seqlens_q": int32([0, 3, 6]), "cu_seqlens_k": int32([0, 9, 20])}
    packed = Case(q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), ends).args()
    wild = (
        paged._replace(block_table=int32([[-7, far], [far, -1]])),
        paged._replace(seqused_k=int32([far, -5]), cache_leftpad=int32([-far, far])),
        rows._replace(cache_batch_idx=int32([-5, far])),
        packed._replace(cu_seqlens_q=int32([-9, 3, far]), cu_seqlens_k=int32([-9, 9, far])),
    )
    for args in wild:
        for tiles in (PrefillTiles(16, 16, 16), DecodeTiles(16, 16)):
            assert run(args, tiles)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["bool", "float16", "lowest"])
@pytest.mark.parametrize("shape", [(2, 4, 50, 90), (1, 1, 50, 90), (2, 1, 1, 90), (1, 4, 50, 1)])
def test_user_masks(shape: tuple[int, ...], kind: str) -> None:
    """Arbitrary masks, broadcast as they like; rows that see nothing, by -inf and by the lowest number."""
    keep = torch.rand(shape) > 0.4
    keep[..., :1, :] = False
    mask: Tensor = keep
    if kind == "float16":
        mask = torch.randn(shape).half().masked_fill(~keep, -torch.inf)
    elif kind == "lowest":
        mask = torch.zeros(shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    q, k, v = (torch.randn(2, n, h, 32).half() for n, h in ((50, 4), (90, 2), (90, 2)))
    options = {"attn_mask": mask, "causal": True, "return_lse": True}
    check(Case(q, k, v, options), PrefillTiles(32, 32, 32))


@pytest.mark.parametrize(
    ("dtypes", "head_dim", "message"),
    [
        ((torch.float32, torch.float32), 64, "float32.*expected all float16"),
        ((torch.float16, torch.bfloat16), 64, "bfloat16.*expected all float16"),
        ((torch.float16, torch.float16), 257, "257.*expected 1 to 256"),
    ],
)
def test_refuses(dtypes: tuple[torch.dtype, torch.dtype], head_dim: int, message: str) -> None:
    """What no kernel is there for, by name, value and what is accepted."""
    q, k = (torch.zeros(1, 2, 1, head_dim, dtype=dtype, device=DEVICE) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, scale=1.0)
