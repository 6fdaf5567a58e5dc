"""Small calls that ask for every feature of every op: what `fastattn report` runs on a backend and checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import build_args
from .quant import packed
from .spec import (
    AppendKvArgs,
    DecodeSumArgs,
    EmbeddingArgs,
    EncodeArgs,
    LinearArgs,
    MxPackArgs,
    MxUnpackArgs,
    OpArgs,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, TOKENS, BATCH = 4, 2, 64, 256, 37, 2
#: (element, block, scale, search) of the codec.
_FORMATS = (
    ("e2m1", 32, "floor", False), ("e4m3", 16, "floor", False), ("int8", 32, "floor", False),
    ("e3m2", 32, "even", False), ("e2m1", 32, "ceil", True), ("e2m1", 16, "e4m3", True),
    ("int4", 32, "fp16", False),
)  # fmt: skip
_TREATED: dict[str, Any] = {"rotate": 64, "outliers": (3, 70, 255)}


class Call(NamedTuple):
    """One call of one op."""

    name: str
    op: str
    args: OpArgs


class _Values:
    """Random tensors of one dtype on a device, the same ones on every machine."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype).to(self.device)

    def int32(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device)


def calls(device: torch.device, dtype: torch.dtype) -> Iterator[Call]:
    """Every kind of call in ``dtype``, its tensors on ``device``; some call asks for each feature."""
    made = _Values(device, dtype)
    for kinds in (_attention, _cache, _rows, _matrices, _messages):
        yield from kinds(made)


def _attention(made: _Values) -> Iterator[Call]:
    def call(name: str, queries: int = TOKENS, keys: int = TOKENS, **options: Any) -> Call:
        shapes = ((BATCH, queries, HEADS, HEAD_DIM), *[(BATCH, keys, KV_HEADS, HEAD_DIM)] * 2)
        return Call(name, "attention", build_args(*(made(*s) for s in shapes), **options))

    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=made.device)
    keep = made.integers(4, BATCH, 1, TOKENS, TOKENS) > 0
    yield call("full")
    yield call("causal", return_lse=True, causal=True)
    yield call("causal, more keys than queries", keys=2 * TOKENS + 1, causal=True)
    yield call("window", causal=True, window=(9, None))
    yield call("soft cap", causal=True, softcap=5.0)
    yield call("ALiBi", causal=True, alibi_slopes=slopes)
    yield call("sinks", causal=True, sinks=made(HEADS, dtype=torch.float32))
    yield call("bool mask", attn_mask=keep)
    yield call("additive mask", attn_mask=torch.where(keep, 0.5, -torch.inf).to(made.dtype))
    yield call("left padding and lengths", cache_leftpad=made.int32(3, 0), cache_seqlens=made.int32(30, 21))
    yield call("rows of a cache", cache_batch_idx=made.int32(1, 0))
    yield call("positions", causal=True, q_pos0=made.int32(5, 40), k_pos0=made.int32(0, 9))
    scale = torch.tensor([0.5, 2.0], device=made.device)
    yield call("scales of k and v", k_scale=scale, v_scale=scale)
    yield call("decode", queries=1, keys=300, causal=True)
    yield call("decode with sinks", queries=1, keys=300, causal=True, sinks=made(HEADS, dtype=torch.float32))

    ends = made.int32(0, 20, 20, 2 * TOKENS)
    q, k, v = (made(2 * TOKENS, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    packing: dict[str, Any] = {
        "cu_seqlens_q": ends,
        "cu_seqlens_k": ends,
        "max_seqlen_q": 54,
        "max_seqlen_k": 54,
    }
    yield Call("packed", "attention", build_args(q, k, v, causal=True, **packing))
    for page, layout in ((16, "nhd"), (128, "nhd"), (128, "npu_nz")):
        pages = tuple(made(6, page, KV_HEADS, HEAD_DIM) for _ in range(2))
        where: dict[str, Any] = {"block_table": made.int32(4, 1, 5, 0, 3, 2).view(2, 3), "kv_layout": layout}
        where["cache_seqlens"] = made.int32(3 * page - 3, 2 * page + 7)
        for name, queries in (("prefill", 11), ("decode", 1)):
            args = build_args(made(BATCH, queries, HEADS, HEAD_DIM), *pages, causal=True, **where)
            suffix = " in NZ" if layout == "npu_nz" else ""
            yield Call(f"{name} from pages of {page}{suffix}", "attention", args)


def _angles(made: _Values) -> dict[str, Any]:
    phase = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    positions = made.integers(50, TOKENS)
    return {"cos": phase.cos().to(made.device), "sin": phase.sin().to(made.device), "positions": positions}


def _cache(made: _Values) -> Iterator[Call]:
    angles = _angles(made)
    for pairs in (False, True):
        name = "of pairs" if pairs else "of halves"
        turn = RotaryArgs(made(TOKENS, HEADS, HEAD_DIM), **angles, interleaved=pairs)
        yield Call(f"rotary {name}", "rotary", turn)
    scales = {f"{t}_scale": torch.tensor([0.5, 2.0], device=made.device) for t in "kv"}
    appends: dict[str, dict[str, Any]] = {
        "append": {},
        "append with rotary": angles,
        "append with rotary of pairs": {**angles, "interleaved": True},
        "append with scales": scales,
        "append to NZ": {"kv_layout": "npu_nz"},
    }
    for name, options in appends.items():
        keys, values = (made(6, 16, KV_HEADS, HEAD_DIM) for _ in range(2))
        k, v = (made(TOKENS, KV_HEADS, HEAD_DIM) for _ in range(2))
        slots = made.permutation(96)[:TOKENS]
        slots[0] = -1
        yield Call(name, "append_kv", AppendKvArgs(keys, values, k, v, slots, **options))


def _rows(made: _Values) -> Iterator[Call]:
    x, residual = made(TOKENS, HIDDEN), made(TOKENS, HIDDEN)
    yield Call("norm", "rms_norm", RmsNormArgs(x, made(HIDDEN), 1e-5))
    yield Call("norm with residual", "rms_norm", RmsNormArgs(x, made(HIDDEN), 1e-5, residual))
    yield Call("gate", "swiglu", SwigluArgs(made(TOKENS, 2 * HIDDEN)))


def _weights(made: _Values, out: int) -> Iterator[tuple[str, PackedWeight]]:
    group, groups = 32, HIDDEN // 32
    scales, mins = (made(out, groups, dtype=torch.float16) / 16 for _ in range(2))
    nibbles, octets = made.integers(16, out, HIDDEN), made.integers(256, out, HIDDEN) - 128
    act_order = (made.permutation(HIDDEN) // group).to(torch.int32)
    yield "dense", packed.dense(made(out, HIDDEN))
    yield "8 bits", packed.pack_int8(octets, scales / 16, None, group)
    yield "8 bits with offsets", packed.pack_int8(octets, scales / 16, mins, group)
    yield "4 bits", packed.pack_int4(nibbles, scales, mins, group)
    yield "4 bits with act-order", packed.pack_int4(nibbles, scales, mins, group, g_idx=act_order)
    shuffled = made.permutation(HIDDEN)
    yield "4 bits, permuted", packed.pack_int4(nibbles, scales, mins, group, x_perm=shuffled)
    yield "4 bits with bias", packed.pack_int4(nibbles, scales, mins, group, bias=made(out))
    scales, mins = (t[:, : groups // 2].contiguous() for t in (scales, mins))
    wide = packed.pack_int4(nibbles, scales, mins, 2 * group)
    yield "4 bits, cut inside a group", packed.slice_in(wide, group, HIDDEN)


def _matrices(made: _Values) -> Iterator[Call]:
    out = 80
    ids = made.integers(out, TOKENS)
    for name, weight in _weights(made, out):
        for rows in (1, 2 * TOKENS):
            linear = LinearArgs(made(rows, weight.shape[1]), weight)
            yield Call(f"linear, {name}, {rows} rows", "linear", linear)
            if name in ("8 bits", "4 bits"):
                in_8_bits = linear._replace(act="int8")
                yield Call(f"linear, {name}, {rows} rows in 8 bits", "linear", in_8_bits)
        if weight.bias is None:
            yield Call(f"embedding, {name}", "embedding", EmbeddingArgs(ids, weight, made.dtype))


def _messages(made: _Values) -> Iterator[Call]:
    """The codec of compressed sums; what is unpacked and decoded was packed by the oracle."""
    from . import reference_mx

    def stored(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(made.device) for t in tensors)

    for element, block, scale, search in _FORMATS:
        name = f"{element} of {block}, {scale}"
        pack = MxPackArgs(made(TOKENS, HIDDEN), element, block, scale, search)
        yield Call(f"MX {name}", "mx_pack", pack)
        codes, scales = stored(*reference_mx.mx_pack(pack._replace(x=pack.x.cpu())))
        unpack = MxUnpackArgs(codes, scales, element, block, HIDDEN, made.dtype, scale)
        yield Call(f"back from MX {name}", "mx_unpack", unpack)
        for treated, options in (("", dict[str, Any]()), (", rotated, with outliers", _TREATED)):
            encode = EncodeArgs(made(TOKENS, HIDDEN), element, block, scale, search, **options)
            yield Call(f"message of {name}{treated}", "encode", encode)
            messages = stored(
                *(reference_mx.encode(encode._replace(x=made(TOKENS, HIDDEN).cpu())) for _ in "ab")
            )
            summed = DecodeSumArgs(messages, TOKENS, HIDDEN, made.dtype, element, block, scale, **options)
            yield Call(f"sum of messages of {name}{treated}", "decode_sum", summed)
