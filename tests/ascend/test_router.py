"""The router's choices: what they compute by the operators' documents, and how they fit the real schemas."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import accumulate

import pytest
import torch

from ascend_ops.router import AttentionCall, Invocation, chip_of, current, route
from ascend_ops.router import attention as routing
from ascend_ops.router.atb import plain_pages
from ascend_ops.router.call import host
from ascend_ops.router.validate import faults
from fastattn import reference
from fastattn.spec import AttentionArgs
from tests.api.cases import assert_accurate, torch_math

from .cases import CHIPS, nz_stored, random_args, router_call
from .documented import outputs
from .schemas import ask

SEEDS = range(250)


@cache
def chosen(family: str) -> list[tuple[AttentionArgs, Invocation]]:
    """Every random call that the chip can run, with its choice."""
    found = []
    for seed in SEEDS:
        a = random_args(seed, family)
        if a.kv_layout == "npu_nz":
            a = nz_stored(a)
        call = router_call(a)
        if route(call, CHIPS[family]).unsupported():
            continue
        i = route(call, CHIPS[family]).invocation()
        if i is not None:
            found.append((a, i))
    return found


def plain(a: AttentionArgs) -> AttentionArgs:
    """The call with pages as the oracle reads them."""
    if a.kv_layout == "nhd":
        return a

    return a._replace(k=plain_pages(a.k), v=plain_pages(a.v), kv_layout="nhd")


@pytest.mark.parametrize("family", CHIPS)
def test_calls_mean_what_was_asked(family):
    """The documented meaning of each call, against the oracle; accuracy as of any backend."""
    names = Counter(i.name for _, i in chosen(family))
    expected = {
        "910b": {"npu_fused_infer_attention_score_v2": 40, "npu_fusion_attention_v2": 40},
        "910_93": {"npu_fused_infer_attention_score_v2": 30},
        "950": {"npu_fusion_attention_v2": 20},
        "310p": {
            "_npu_flash_attention_v3": 10,
            "_npu_paged_attention": 10,
            "_npu_paged_attention_splitfuse_v2": 10,
            "_npu_paged_attention_splitfuse": 5,
        },
        "310p before": {"_npu_flash_attention": 10, "_npu_paged_attention_splitfuse": 10},
        "910a": {"_npu_paged_attention": 10, "_npu_paged_attention_splitfuse": 10},
    }[family]
    assert all(names[n] >= count for n, count in expected.items()), names
    for a, i in chosen(family):
        out, lse = i.finish(outputs(i))
        exact, exact_lse = reference.attention(plain(a))
        same, same_lse = torch_math(plain(a))
        assert_accurate(out, same, exact, i)
        if a.return_lse:
            assert lse.dtype == torch.float32
            assert_accurate(lse, same_lse, exact_lse, i)


@pytest.mark.parametrize("family", CHIPS)
def test_calls_keep_to_the_operators_rules(family):
    for a, i in chosen(family):
        assert faults(i) == [], (i, a.features())


@pytest.mark.parametrize("family", CHIPS)
def test_calls_capture_nothing_that_the_host_must_read(family):
    """In a capture, what runs is dense and of known lengths; the rest has the reason."""
    for seed in range(40):
        call = router_call(random_args(seed, family))
        if route(call, CHIPS[family], capturing=True).unsupported():
            continue
        i = route(call, CHIPS[family], capturing=True).invocation()
        assert i is None or faults(i) == []


def call_of(*, sq=4, sk=9, d=128, dtype=torch.float16, heads=(4, 2), batch=2, **o) -> AttentionCall:
    q = torch.zeros(batch, sq, heads[0], d, dtype=dtype)
    k = torch.zeros(batch, sk, heads[1], d, dtype=dtype)
    return AttentionCall(q, k, k, d**-0.5, **o)


def paged(page=128, d=128, heads=(4, 2), sq=4, pages=4, lens=(9, 9), **o) -> AttentionCall:
    q = torch.zeros(len(lens), sq, heads[0], d, dtype=torch.float16)
    k = torch.zeros(pages, page, heads[1], d, dtype=torch.float16)
    table = torch.zeros(len(lens), 2, dtype=torch.int32)
    used = torch.tensor(lens, dtype=torch.int32)
    return AttentionCall(q, k, k, 0.1, block_table=table, seqused_k=used, **o)


def packed(*lens) -> AttentionCall:
    rows = torch.empty(sum(lens), 1, 128, dtype=torch.float16, device="meta")
    ends = torch.tensor([0, *accumulate(lens)], dtype=torch.int32)
    return AttentionCall(rows, rows, rows, 0.1, right=0, cu_seqlens_q=ends, cu_seqlens_k=ends)


LIMITS = {
    "softcap": (call_of(softcap=5.0), "fused_infer", "softcap: not an argument"),
    "alibi": (call_of(alibi_slopes=torch.ones(4)), "fused_infer", "alibi_slopes: not an argument"),
    "float32": (call_of(dtype=torch.float32), "fused_infer", "dtype: torch.float32"),
    "head_dim 528": (call_of(d=528), "fused_infer", "head_dim: 528"),
    "head_dim 40": (call_of(d=40), "fused_infer", "head_dim: 40"),
    "heads": (call_of(heads=(257, 257), d=16), "fused_infer", "heads: 257"),
    "ratio": (call_of(heads=(130, 2), d=16), "fused_infer", "heads: 130 over 2"),
    "page 64": (paged(page=64), "fused_infer", "page size: 64"),
    "page 640": (paged(page=640), "fused_infer", "page size: 640"),
    "decode page 24": (paged(page=24, sq=1), "fused_infer", "page size: 24"),
    "wide pages": (paged(heads=(512, 512)), "fused_infer", "512 KV heads of 128"),
    "all pages": (
        paged()._replace(k=torch.empty(1 << 16, 128, 2, 128, dtype=torch.float16, device="meta")),
        "fused_infer", "fewer than 2^31 in pages",
    ),
    "wide rows": (call_of(heads=(256, 4), d=256), "fused_infer", "256 of 256, their product"),
    "long packed": (packed((1 << 20) - 7, 8), "fused_infer", "at most 2^20 together"),
    "shared pages": (paged(pages=1), "fused_infer", "shared pages are refused"),
    "one row, band": (call_of(sq=1, left=3, right=0, d=64), "fused_infer", "ignores pre_tokens"),
    "one row, mask": (
        call_of(sq=1, sk=513, attn_mask=torch.ones(2, 1, 1, 513, dtype=torch.bool).expand(2, 4, 1, 513)),
        "fused_infer",
        "past 512 it is ignored",
    ),
    "long decode": (call_of(sq=1, sk=262145, d=16, heads=(1, 1), batch=1), "fused_infer", "at most 262144"),
    "mask per head": (
        call_of(attn_mask=torch.ones(2, 4, 4, 9, dtype=torch.bool)), "fused_infer", "one per head",
    ),
    "batch": (call_of(batch=65537, sq=1, sk=1, d=16, heads=(1, 1)), "fused_infer", "at most 65536"),
    "odd sinks": (
        call_of(sinks=torch.full((4,), 0.1), left=2, right=0), "fused_infer", "not exact",
    ),
    "nz": (paged(kv_layout="npu_nz"), "fused_infer", "kv_layout"),
    "pages": (paged(), "fusion", "block_table: not an argument"),
    "v wider": (
        call_of(d=64)._replace(v=torch.zeros(2, 9, 2, 72, dtype=torch.float16)),
        "fusion", "head_dim: 64 and 72",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_reasons(name):
    """Each documented limit, just passed, is named."""
    call, family, text = LIMITS[name]
    assert any(text in why for why in route(call, chip_of("910b")).against[family])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (call_of(), "k: other lengths than q"),
        (call_of(sk=4, right=None), "causal"),
        (call_of(sk=4, right=0, dtype=torch.bfloat16), "float16"),
        (call_of(sk=4, right=0, left=2), "window"),
        (call_of(sk=4, right=0, return_lse=True), "return_lse"),
        (paged(right=0), "pages on 310p are NZ"),
        (paged(right=0, kv_layout="npu_nz", page=256), "page size: 256"),
        (
            paged(right=0, left=99, kv_layout="npu_nz", pages=300, sq=20000, lens=(20000, 9)),
            "20000 keys, a mask as large as the scores is made for at most 268435456: prefill in chunks",
        ),
        (paged(right=0, kv_layout="npu_nz", lens=(9,) * 2001, pages=1), "batch: 2001, at most 2000"),
    ],
)
def test_limits_of_310p(call, text):
    call = call._replace(right=0) if text.startswith("k: other") else call
    assert any(text in why for why in route(call, chip_of("310p")).against["atb"])


def test_310p_needs_no_large_mask_for_long_prompts():
    """Where ATB has compressed masks; 16400 tokens, in pages or not."""
    plain_call = call_of(sq=16400, sk=16400, right=0, d=16, heads=(1, 1), batch=1)
    pages = paged(right=0, kv_layout="npu_nz", pages=300, lens=(16400, 9))
    for call, shape in ((plain_call, (1, 128, 2048, 16)), (pages, (2048, 2048))):
        assert route(call, CHIPS["310p"]).invocation().kwargs["mask"].shape == shape
    with pytest.raises(ValueError, match="16400 queries of 16400 keys"):
        route(plain_call, CHIPS["310p before"]).invocation()


@pytest.mark.parametrize("chip", ["310p before", "910a"])
def test_older_operators_take_long_prompts_in_chunks(chip):
    """Their mask is as large as the scores of the chunk: 8 queries, padded to 16, of 16400 keys."""
    pages = paged(right=0, kv_layout="npu_nz", pages=300, lens=(16400, 9))
    assert route(pages, CHIPS[chip]).invocation().kwargs["mask"].shape == (1, 1025, 16, 16)


def test_910a_reads_pages_only():
    assert "k: not in pages" in "\n".join(route(call_of(right=0), chip_of("910a")).unsupported())
    with pytest.raises(ValueError, match="on 910a can run this call"):
        route(call_of(), chip_of("910a")).invocation()


def test_the_longest_that_is_allowed():
    for call in (packed((1 << 20) - 8, 8), call_of(heads=(255, 255), d=256), paged()):
        assert route(call, chip_of("910b")).against["fused_infer"] == []


def test_refusal_says_everything():
    with pytest.raises(
        ValueError, match=r"(?s)fused_infer: softcap.*fusion: softcap.*atb: _npu_paged"
    ) as error:
        route(call_of(softcap=2.0), chip_of("910b")).invocation()
    assert "910b" in str(error.value)


def test_old_torch_npu_gets_the_first_operator():
    chip = chip_of("910b")
    older = chip._replace(operators=chip.operators - {"npu_fused_infer_attention_score_v2"})
    i = route(call_of(right=0), older).invocation()
    assert i.name == "npu_fused_infer_attention_score"
    assert faults(i) == []


def test_lengths_are_read_once_per_version():
    lens = torch.tensor([3, 4], dtype=torch.int32)
    assert host(lens) is host(lens)
    lens[0] = 5
    assert host(lens) == (5, 4)


class OnDevice(torch.Tensor):
    """Values of the CPU that say they are on a device; counts how often the host reads them."""

    device = torch.device("meta")
    reads = 0

    def tolist(self):
        OnDevice.reads += 1
        return super().tolist()


def test_a_call_reads_its_lengths_once():
    """To refuse and to call is one decision, even for tensors of inference mode, which tell no version."""
    with torch.inference_mode():
        lens = torch.tensor([9, 9], dtype=torch.int32).as_subclass(OnDevice)
        call = paged(right=0)._replace(seqused_k=lens)
        OnDevice.reads = 0
        found = route(call, chip_of("910b"))
        assert not found.unsupported()
        assert found.invocation().kwargs["actual_seq_kvlen"] == [9, 9]
        assert OnDevice.reads == 1
        assert "softcap" in route(call._replace(softcap=1.0), chip_of("910b")).unsupported()[0]
        assert OnDevice.reads == 1  # nothing to decide by them


def test_captures_freeze_no_lengths():
    """Lengths that an earlier call has read are constants in a graph that is replayed with other ones."""
    lens = torch.tensor([9, 9], dtype=torch.int32).as_subclass(OnDevice)
    call = paged()._replace(seqused_k=lens)
    assert host(lens) == (9, 9)
    assert not route(call, chip_of("910b")).unsupported()
    assert "lengths: on the device" in route(call, chip_of("910b"), capturing=True).unsupported()[0]
    on_host = call._replace(seqused_k=torch.tensor([9, 9], dtype=torch.int32))
    assert not route(on_host, chip_of("910b"), capturing=True).unsupported()


def test_sinks_are_read_once_per_version_and_never_in_a_capture():
    def against(sinks, **o):
        call = call_of(left=2, right=0, sinks=sinks)
        return "; ".join(route(call, chip_of("910b"), **o).against["fused_infer"])

    sinks = torch.ones(4)
    assert against(sinks) == ""
    sinks[1] = 0.1
    assert "not exact" in against(sinks)
    there = torch.ones(4).as_subclass(OnDevice)
    assert "cannot be read" in against(there, capturing=True)
    assert against(there) == ""
    assert against(there, capturing=True) == ""


def test_empty_calls_need_no_operator():
    call = call_of(sk=0, return_lse=True)
    assert route(call, chip_of("910b")).invocation() is None
    out, lse = routing.empty(call)
    assert out.shape == (2, 4, 4, 128)
    assert not out.any()
    assert lse.shape == (2, 4, 4)
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kind", [torch.bool, torch.float16])
def test_a_mask_per_head_has_every_sequence(kind):
    """The operator takes BNSS, B1SS and 11SS; (1, N, Sq, Sk) is none of them."""
    mask = torch.rand(1, 4, 4, 9) > 0.5
    mask = (mask if kind == torch.bool else torch.zeros(1, 4, 4, 9).masked_fill(~mask, -torch.inf)).to(kind)
    i = route(call_of(attn_mask=mask.expand(2, -1, -1, -1)), chip_of("910b")).invocation()
    assert i.name == "npu_fusion_attention_v2"
    assert i.kwargs["atten_mask"].shape == (2, 4, 4, 9)
    assert faults(i) == []
    one = i._replace(kwargs={**i.kwargs, "atten_mask": i.kwargs["atten_mask"][:1]})
    assert any("atten_mask: (1, 4, 4, 9)" in f for f in faults(one))


def test_no_square_mask_for_long_sequences():
    """Causal and banded calls carry the same 2048 x 2048 triangle at any length."""
    for o in ({"right": 0}, {"left": 4096, "right": 0}):
        call = AttentionCall(
            *(torch.empty(1, 65536, 1, 128, dtype=torch.float16, device="meta"),) * 3, 0.1, **o
        )
        mask = route(call, chip_of("910b")).invocation().kwargs["atten_mask"]
        assert mask.shape == (2048, 2048)


@pytest.mark.toolchain
def test_calls_match_torch_npus_schemas():
    """Names, keywords and dtypes of every call, and the shapes that the meta kernels infer."""
    invocations = [i for family in CHIPS for _, i in chosen(family)]
    for seed in range(100):
        call = router_call(random_args(seed, "910b"))
        if not route(call, chip_of("910b"), capturing=True).unsupported():
            captured = route(call, chip_of("910b"), capturing=True).invocation()
            invocations += [] if captured is None else [captured]
    assert {i.name for i in invocations} >= {"npu_fusion_attention_v3", "_npu_paged_attention"}
    for i, answer in zip(invocations, ask(invocations), strict=True):
        assert "error" not in answer, (i.name, answer)
        assert answer["meta"] == (i.namespace == "npu")
        if answer["meta"]:
            found = [(tuple(shape), dtype) for shape, dtype in answer["outputs"]]
            real = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in outputs(i)]
            # The meta kernels of fusion_attention give out q's head_dim, and v2's a softmax_max that is right
            # in BNSD only; the operators themselves (FlashAttentionKernelNpuOpApi.cpp) do as documented.
            if "fusion" in i.name:
                real, found = (n[: 3 if i.args[4] == "BNSD" else 1] for n in (real, found))
                if i.args[0].shape[-1] != i.args[2].shape[-1]:
                    continue
            assert [r if f[0] != (0,) else f for r, f in zip(real, found, strict=True)] == found, i.name


@pytest.mark.toolchain
def test_schemas_refuse_what_is_wrong():
    """The check above can fail: a keyword of v1 in v2, and a layout that does not exist."""
    good = route(call_of(right=0), chip_of("910b")).invocation()
    renamed = good._replace(kwargs={**good.kwargs, "num_heads": 4})
    layout = good._replace(kwargs={**good.kwargs, "input_layout": "DNSB"})
    answers = ask([good, renamed, layout])
    assert "error" not in answers[0]
    assert "num_heads" in answers[1]["error"]
    assert "error" in answers[2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"atten_mask": torch.ones(9, 9, dtype=torch.bool)}, "atten_mask"),
        ({"sparse_mode": 0}, "sparse_mode"),
        ({"sparse_mode": 4}, "sparse_mode"),
        ({"num_query_heads": 8}, "heads of q"),
        ({"num_key_value_heads": 4}, "k:"),
        ({"actual_seq_kvlen": [9, 10]}, "actual_seq_kvlen"),
    ],
)
def test_validator_finds_what_schemas_miss(change, text):
    good = route(call_of(right=0), chip_of("910b")).invocation()
    assert faults(good) == []
    assert any(text in f for f in faults(good._replace(kwargs={**good.kwargs, **change})))


@pytest.mark.gpu
def test_on_a_device():
    """Every random call that this chip can run, on the chip."""
    if not (hasattr(torch, "npu") and torch.npu.is_available()):
        pytest.skip("no NPU")
    chip = current()
    for seed in SEEDS:
        a = random_args(seed, chip.family)
        stored = nz_stored(a) if a.kv_layout == "npu_nz" else a
        moved = stored._replace(
            **{n: t.npu() for n, t in stored._asdict().items() if isinstance(t, torch.Tensor)}
        )
        if route(router_call(moved), chip).unsupported():
            continue
        i = route(router_call(moved), chip).invocation()
        if i is not None:
            a = plain(a)
            assert_accurate(i()[0].cpu(), torch_math(a)[0], reference.attention(a)[0], i.name)
