"""Formats of few bits and messages on the Triton kernels: the oracle's bytes, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fastattn import reference_mx
from fastattn.quant import mx
from fastattn.quant.codec import Codec
from fastattn.spec import DecodeSumArgs, EncodeArgs, MxPackArgs, MxUnpackArgs, Op
from tests.ops.runners import FLOATS, random, run

Ops = Mapping[str, Op]

pytestmark = [pytest.mark.toolchain, pytest.mark.emulate("triton")]

MESSAGES = [
    Codec(),
    Codec("int4", 16, "fp16", True),
    Codec("e2m1", 32, "e4m3", True, 0, (0, 3, 44)),
    Codec("int4", 32, "e4m3", False, 64, (1, 2)),
    Codec("e1m1", 8, "even", False, 128),
    Codec("e3m2", 64, "ceil", True, 32, tuple(range(9))),
]


@pytest.mark.parametrize("element", mx.ELEMENTS)
@pytest.mark.parametrize("scale", mx.SCALES)
def test_pack_and_unpack(ops: Ops, element: str, scale: str) -> None:
    """Subnormals, zeros, infinities, NaN, a tail that is no whole byte, and each way to choose a scale."""
    for block, search, dtype in zip((8, 16, 128), (False, True, False), FLOATS, strict=True):
        x = random(5, 77, seed=block, dtype=dtype, scale=100)
        x[0, :16] *= 1e-38 if dtype != torch.float16 else 1e-7
        x[1, 5], x[1, 40], x[2] = torch.inf, torch.nan, 0
        x[3] *= 2.0 ** torch.randint(-20, 6, (77,))
        args = MxPackArgs(x, element, block, scale, search)
        ours, wanted = run(ops, "mx_pack", args), reference_mx.OPS["mx_pack"].run(args)
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
        back = MxUnpackArgs(*ours, element, block, 77, dtype, scale)
        assert_same(run(ops, "mx_unpack", back), reference_mx.OPS["mx_unpack"].run(back))


@pytest.mark.parametrize("element", mx.ELEMENTS)
def test_every_code_and_scale_is_unpacked(ops: Ops, element: str) -> None:
    """Bytes that no encoder writes too: what decodes on one device decodes to the same on every other."""
    n = 1 << mx.element(element).bits
    rows = 256
    codes = torch.randint(0, 256, (rows, mx.code_bytes(n, element)), dtype=torch.uint8)
    for scale in ("floor", "e4m3", "fp16"):
        scales = torch.randint(0, 256, (rows, mx.scale_bytes(n, 8, scale)), dtype=torch.uint8)
        scales[:, 0] = torch.arange(rows)
        args = MxUnpackArgs(codes, scales, element, 8, n, torch.float32, scale)
        assert_same(run(ops, "mx_unpack", args), reference_mx.OPS["mx_unpack"].run(args))


@pytest.mark.parametrize("codec", MESSAGES, ids=lambda c: f"{c.element}-{c.scale}-{c.rotate}")
@pytest.mark.parametrize(("rows", "hidden"), [(3, 131), (2, 576), (0, 128)], ids=str)
def test_messages_and_sums(ops: Ops, codec: Codec, rows: int, hidden: int) -> None:
    c = codec
    format_ = (c.element, c.block, c.scale)
    parts = [random(rows, hidden, seed=s, scale=10.0**s) for s in range(3)]
    args = [EncodeArgs(x, *format_, c.search, c.rotate, c.outliers) for x in parts]
    messages = [run(ops, "encode", a) for a in args]
    for message, a in zip(messages, args, strict=True):
        assert torch.equal(message, reference_mx.encode(a))
    for count in (1, 3):
        for dtype in FLOATS:
            total = DecodeSumArgs(
                tuple(messages[:count]), rows, hidden, dtype, *format_, c.rotate, c.outliers
            )
            assert_same(run(ops, "decode_sum", total), reference_mx.decode_sum(total))


def test_a_block_that_fills_no_bytes_is_a_reason(ops: Ops) -> None:
    args = MxPackArgs(torch.ones(2, 77), "e2m1", 7)
    assert ops["mx_pack"].reasons(args.signature()) == ["block 7, it takes 8, 16, 32, 64, 128"]


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num())
