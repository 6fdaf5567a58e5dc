"""Messages of compressed communication: every backend's bytes and sums, against the oracle and float64."""

from __future__ import annotations

import json
import re
import threading
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattn import dispatch, native, reference_mx
from fastattn.backends import cpu_mx, torch_mx
from fastattn.quant import mx
from fastattn.quant.codec import Codec
from fastattn.spec import DecodeSumArgs, EncodeArgs

from .runners import FLOATS, random, run

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
CODECS = [
    Codec(),
    Codec("int4", 16, "fp16", True),
    Codec("e2m1", 32, "e4m3", True, 0, (0, 3, 44)),
    Codec("int4", 32, "e4m3", False, 64, (1, 2)),
    Codec("e1m1", 8, "even"),
    Codec("e2m2", 7, "ceil", False, 32, (99,)),
    Codec("e4m3", 128, "floor", False, 128),
    Codec("int8", 32, "fp16", False, 0, tuple(range(20))),
    Codec("e3m2", 33, "e4m3", True, 32),
]
NAMED = pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.element}-{c.scale}-{c.rotate}")


def encode_args(codec: Codec, x: torch.Tensor, threads: int = 1) -> EncodeArgs:
    c = codec
    return EncodeArgs(x, c.element, c.block, c.scale, c.search, c.rotate, c.outliers, threads)


def sum_args(codec: Codec, messages, rows, hidden, dtype, threads: int = 1) -> DecodeSumArgs:
    c = codec
    return DecodeSumArgs(
        tuple(messages), rows, hidden, dtype, c.element, c.block, c.scale, c.rotate, c.outliers, threads
    )


@NAMED
@DTYPES
@pytest.mark.parametrize(("rows", "hidden"), [(1, 100), (5, 576), (3, 131), (0, 128)], ids=str)
def test_messages_and_sums_are_those_of_the_oracle(ops, codec, dtype, rows, hidden):
    parts = [random(rows, hidden, seed=s, dtype=dtype, scale=10.0**s) for s in range(3)]
    args = [encode_args(codec, x) for x in parts]
    messages = [run(ops, "encode", a) for a in args]
    for message, a in zip(messages, args, strict=True):
        assert message.shape == (codec.message_bytes(rows, hidden),)
        assert torch.equal(message, reference_mx.encode(a))
    for count in (1, 2, 3):
        a = sum_args(codec, messages[:count], rows, hidden, dtype)
        ours = run(ops, "decode_sum", a)
        assert (ours.dtype, tuple(ours.shape)) == (dtype, (rows, hidden))
        assert torch.equal(ours, reference_mx.decode_sum(a))


@NAMED
def test_any_number_of_threads_gives_the_same_bytes(native_ops, codec):
    parts = [random(300, 288, seed=s) for s in range(2)]
    one = [run(native_ops, "encode", encode_args(codec, x, 1)) for x in parts]
    two = [run(native_ops, "encode", encode_args(codec, x, 2)) for x in parts]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    sums = [run(native_ops, "decode_sum", sum_args(codec, one, 300, 288, torch.float32, n)) for n in (1, 2)]
    assert torch.equal(*sums)


@NAMED
def test_a_non_finite_value_is_never_lost(ops, codec):
    """NaN and infinities give NaN in their block and, rotated, in all that the rotation mixes with it."""
    hidden = 320
    x, other = random(3 * hidden, hidden, seed=1), random(3 * hidden, hidden, seed=2)
    where = torch.arange(3 * hidden)
    for row, channel in zip(where.tolist(), (where % hidden).tolist(), strict=True):
        x[row, channel] = [torch.nan, torch.inf, -torch.inf][row // hidden]
    messages = [run(ops, "encode", encode_args(codec, part)) for part in (x, other)]
    back = run(ops, "decode_sum", sum_args(codec, messages, 3 * hidden, hidden, torch.float32))
    at = back[where, where % hidden]
    assert not torch.isfinite(at).any()
    clean = run(ops, "decode_sum", sum_args(codec, messages[1:], 3 * hidden, hidden, torch.float32))
    assert torch.isfinite(clean).all()
    # Only what its block touches is spoiled; rotated, what the blocks of its rotated block do.
    widest = 3 * codec.rotate + 2 * codec.block if codec.rotate else codec.block
    assert int((~torch.isfinite(back)).sum(1).max()) <= widest


@given(
    st.sampled_from(list(mx.ELEMENTS)),
    st.sampled_from(mx.SCALES),
    st.booleans(),
    st.sampled_from([0, 32, 64, 128]),
    st.integers(1, 70),
    st.sets(st.integers(0, 199), max_size=12),
    st.integers(0, 4),
    st.integers(1, 3),
    st.data(),
)
def test_any_codec(element, scale, search, rotate, block, outliers, rows, world, data):
    codec = Codec(element, block, scale, search, rotate, tuple(sorted(outliers)))
    hidden = data.draw(st.integers(max(outliers, default=0) + 1, 300))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    parts = [torch.randn(rows, hidden, generator=generator) * 2.0 ** (3 * i) for i in range(world)]
    messages = [codec.encode(x) for x in parts]
    assert all(m.numel() == codec.message_bytes(rows, hidden) and m.is_contiguous() for m in messages)
    for m, x in zip(messages, parts, strict=True):
        assert torch.equal(m, torch_mx.encode(encode_args(codec, x)))
    total = codec.decode_sum(messages, rows, hidden, torch.float32)
    assert torch.equal(total, torch_mx.decode_sum(sum_args(codec, messages, rows, hidden, torch.float32)))
    if rows:  # no value is off by more than its block's largest, which a rotation makes up to rotate^(1/2) of
        largest = sum(float(x.abs().max()) for x in parts)
        assert float((total - sum(parts)).abs().max()) <= largest * max(rotate, 1)


@pytest.mark.parametrize("rotate", [32, 64, 128])
def test_rotation_commutes_with_the_sum(ops, rotate):
    """With 8-bit elements and fine scales the sum is that of float64, within what the format allows."""
    codec = Codec("int8", 32, "fp16", rotate=rotate)
    parts = [random(20, 300, seed=s) for s in range(3)]
    messages = [run(ops, "encode", encode_args(codec, x)) for x in parts]
    total = run(ops, "decode_sum", sum_args(codec, messages, 20, 300, torch.float32))
    exact = sum(x.double() for x in parts)
    # Rotated values are normal too: |x| < 5; a block's step is its largest value / 127, half of it an error,
    # and the rotation adds the errors of `rotate` values with weights 1 / sqrt(rotate): 3 messages, 6 sigma.
    bound = 3 * 5 / 127 / 12**0.5 * 6
    assert float((total.double() - exact).abs().max()) < bound
    assert float((total.double() - exact).abs().max()) > 0
    plain = [run(ops, "encode", encode_args(Codec("int8", 32, "fp16"), x)) for x in parts]
    assert not torch.equal(messages[0], plain[0])


@pytest.mark.parametrize("rotate", [32, 64, 128])
def test_rotation_is_its_own_inverse(rotate):
    matrix = torch.from_numpy(reference_mx.hadamard(rotate))
    assert torch.equal(matrix @ matrix.T, rotate * torch.eye(rotate, dtype=torch.float64))
    x = random(7, 3 * rotate + 5, seed=1)
    turned = torch_mx.rotate(x, rotate)
    exact = (x[:, : 3 * rotate].double().unflatten(1, (3, rotate)) @ (matrix / rotate**0.5)).flatten(1)
    assert torch.allclose(turned[:, : 3 * rotate].double(), exact, atol=1e-5)
    assert torch.equal(turned[:, 3 * rotate :], x[:, 3 * rotate :])
    assert torch.allclose(torch_mx.rotate(turned, rotate), x, atol=1e-5)


@DTYPES
def test_outliers_are_kept_to_16_bits_and_raise_no_scale(ops, dtype):
    outliers = (0, 17, 18, 63)
    codec = Codec("e2m1", 32, outliers=outliers)
    parts = [random(9, 64, seed=s, dtype=dtype) for s in range(2)]
    for x in parts:
        x[:, list(outliers)] *= 1000
    messages = [run(ops, "encode", encode_args(codec, x)) for x in parts]
    total = run(ops, "decode_sum", sum_args(codec, messages, 9, 64, dtype))
    kept = [c for c in range(64) if c not in outliers]
    wanted = reduce(torch.add, [x[:, list(outliers)].bfloat16().float() for x in parts]).to(dtype)
    assert torch.equal(total[:, list(outliers)], wanted)
    plain = [run(ops, "encode", encode_args(Codec("e2m1", 32), x[:, kept])) for x in parts]
    rest = run(ops, "decode_sum", sum_args(Codec("e2m1", 32), plain, 9, 60, dtype))
    assert torch.equal(total[:, kept], rest)


def test_sum_is_in_the_order_given():
    """Float32 addition is not associative: every rank must add in the same order, and the order counts."""
    codec = Codec("e5m2", 1)
    a, b = torch.full((1, 1), 2.0**60), torch.full((1, 1), 1.0)
    messages = [codec.encode(t) for t in (a, b, -a)]
    assert codec.decode_sum(messages, 1, 1, torch.float32).item() == 0.0
    assert codec.decode_sum([messages[i] for i in (0, 2, 1)], 1, 1, torch.float32).item() == 1.0


def test_out_is_written_and_returned():
    codec, x = Codec(), random(4, 64, seed=1)
    message = codec.encode(x)
    out = torch.full((4, 64), torch.nan)
    assert codec.decode_sum([message], 4, 64, torch.float32, out=out) is out
    assert torch.equal(out, codec.decode_sum([message], 4, 64, torch.float32))


def test_strided_input_is_the_same_message():
    codec, x = Codec("e2m1", 32, "e4m3"), random(6, 200, seed=1)
    assert torch.equal(codec.encode(x[:, 10:110]), codec.encode(x[:, 10:110].clone()))
    assert torch.equal(codec.encode(x.T[:100]), codec.encode(x.T[:100].clone()))


def test_threads_of_a_rank_encode_at_once():
    """A communication thread runs beside the model: no shared scratch memory."""
    codec, x = Codec("e2m1", 32, "e4m3", True, 64), random(64, 576, seed=1)
    wanted, wrong = codec.encode(x), []

    def loop() -> None:
        for _ in range(30):
            message = codec.encode(x)
            if not torch.equal(message, wanted):
                wrong.append(message)

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (Codec(), 4.25),
        (Codec(block=16), 4.5),
        (Codec(block=8), 5.0),
        (Codec("e1m1"), 3.25),
        (Codec("e2m2"), 5.25),
        (Codec("int8", 32, "fp16"), 8.5 + 8 / 576),
        (Codec("e2m1", 32, "e4m3"), 4.25 + 8 / 576),
        (Codec("e2m1", 32, outliers=tuple(range(16))), (560 * 4 + 18 * 8 + 16 * 16) / 576),
    ],
    ids=str,
)
def test_effective_bits(codec, bits):
    assert codec.bits(576) == pytest.approx(bits, abs=1e-12)


@NAMED
def test_json_round_trip(codec):
    text = json.dumps(codec.to_json())
    assert Codec.from_json(json.loads(text)) == codec
    assert Codec.from_json({}) == Codec()
    assert hash(Codec.from_json(json.loads(text))) == hash(codec)


BAD_FIELDS = [
    ({"element": "e9m9"}, "element: 'e9m9', expected one of e1m1"),
    ({"element": 4}, "element: 4, expected str"),
    ({"block": 0}, "block: 0, expected at least 1"),
    ({"block": 32.0}, "block: 32.0, expected int"),
    ({"block": True}, "block: True, expected int"),
    ({"block": 1025, "search": True}, "block: 1025, expected 1 to 1024"),
    ({"scale": "round"}, "scale: 'round', expected one of floor"),
    ({"search": 1}, "search: 1, expected bool"),
    ({"rotate": 48}, "rotate: 48, expected one of 0, 32, 64, 128"),
    ({"outliers": [3, 3]}, "outliers: (3, 3), expected channels from 0 in ascending order"),
    ({"outliers": [-1]}, "outliers: (-1,), expected channels from 0"),
    ({"outliers": ["1"]}, "outliers: ('1',), expected integers"),
    ({"outliers": 5}, "outliers: 5, expected tuple"),
    ({"blocks": 32}, "codec: unknown key 'blocks', expected element, block"),
]


@pytest.mark.parametrize(("data", "message"), BAD_FIELDS, ids=[m.split(",")[0] for _, m in BAD_FIELDS])
def test_bad_fields_are_named(data, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Codec.from_json(data)
    with pytest.raises(ValueError, match=r"^codec: 'e2m1', expected an object"):
        Codec.from_json("e2m1")  # type: ignore[arg-type]


def test_bad_calls_are_named():
    codec = Codec(outliers=(70,))
    x = torch.zeros(2, 80)
    message = codec.encode(x)
    for call, match in [
        (lambda: codec.encode(x[0]), r"x: \(80,\), expected \(rows, hidden\)"),
        (lambda: codec.encode(x.double()), "x: torch.float64"),
        (lambda: codec.encode(x[:, :64]), "outliers: channel 70, expected below hidden 64"),
        (lambda: codec.message_bytes(2, 70), "outliers: channel 70"),
        (lambda: codec.message_bytes(-1, 80), "rows: -1"),
        (lambda: codec.decode_sum([], 2, 80, torch.float32), "messages: none"),
        (
            lambda: codec.decode_sum([message[:-1]], 2, 80, torch.float32),
            r"messages\[0\]: torch.uint8 \(\d+,\)",
        ),
        (
            lambda: codec.decode_sum([message, message.float()], 2, 80, torch.float32),
            r"messages\[1\]: torch.fl",
        ),
        (lambda: codec.decode_sum([message], 2, 80, torch.float64), "dtype: torch.float64"),
        (lambda: codec.decode_sum([message], 2, 80, torch.float32, out=x.T), "out: torch.float32"),
        (lambda: codec.decode_sum([message], 2, 80, torch.float32, out=x.half()), "out: torch.float16"),
    ]:
        with pytest.raises(ValueError, match="^" + match):
            call()


def test_the_bindings_check_for_themselves():
    kernels = native.kernels
    kind = cpu_mx._format("e2m1", 32, "floor", False)  # noqa: SLF001
    x, message = torch.zeros(2, 64), torch.zeros(68, dtype=torch.uint8)
    for call, match in [
        (lambda: kernels.encode(x, message[:-1], kind, 0, (), 1), "message: shape"),
        (lambda: kernels.encode(x, message, kind, 48, (), 1), "rotate: 48"),
        (lambda: kernels.encode(x, message, kind, 0, (64,), 1), "outliers: channel 64"),
        (lambda: kernels.encode(x, message, kind, 0, (5, 5), 1), "outliers: channel 5"),
        (lambda: kernels.encode(x.T, message, kind, 0, (), 1), "x: strided"),
        (lambda: kernels.decode_sum((), x, kind, 0, (), 1), "messages: none"),
        (lambda: kernels.decode_sum((x,), x, kind, 0, (), 1), "message: float32"),
    ]:
        with pytest.raises(ValueError, match="^" + match):
            call()


def test_dispatch_picks_the_native_kernels():
    before = dispatch.calls["cpu", "encode"]
    Codec().encode(torch.zeros(1, 32))
    assert dispatch.calls["cpu", "encode"] == before + 1
    with dispatch.use_backend("sdpa"):
        assert Codec().encode(torch.zeros(1, 32)).numel() == 17
