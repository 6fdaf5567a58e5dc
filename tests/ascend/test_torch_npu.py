"""torch_npu's small operators: what each choice computes by the documents, and its schema."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from ascend_ops.router import Invocation, chip_of, small_ops
from ascend_ops.router.atb import plain_pages
from ascend_ops.router.validate import faults
from fastattn import reference_ops
from fastattn.backends import torch_ops
from fastattn.spec import AppendKvArgs, LinearArgs, RmsNormArgs, RotaryArgs, SwigluArgs
from tests.ops.runners import assert_accurate
from tests.ops.test_rotary_append import angles
from tests.ops.weights import make

from .documented import outputs
from .schemas import ask

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
A2, P310, A910 = (chip_of(f) for f in ("910b", "310p", "910a"))
COS, SIN = angles(128)
POSITIONS = torch.tensor([3, 0, 49, 7])
SLOTS = torch.tensor([3, -1, 19, 0])


def values(*shape: int, dtype: torch.dtype = HALF, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def append(chip: Any, dtype: torch.dtype = HALF, slots: torch.Tensor = SLOTS, layout: str = "nhd") -> Any:
    a = AppendKvArgs(torch.zeros(2, 16, 2, 32, dtype=dtype), torch.zeros(2, 16, 2, 32, dtype=dtype),
                     values(4, 2, 32, dtype=dtype), values(4, 2, 32, dtype=dtype, seed=1), slots)  # fmt: skip
    return a, small_ops.append_kv(a.k_cache, a.v_cache, a.k, a.v, a.slots, layout, chip)


def linear(w: Any, x: torch.Tensor, chip: Any = A2) -> Any:
    t = w.tensors
    return small_ops.int8_linear(x, t["codes"], t["scales"], t.get("mins"), w.group_size, w.bias, chip)


@cache
def choices() -> dict[str, tuple[Any, Invocation]]:
    """(record, call) of each operator and kind."""
    found: dict[str, tuple[Any, Any]] = {}
    for dtype in (HALF, BF16, FLOAT):
        x, residual, weight = (
            values(3, 5, 64, dtype=dtype),
            values(3, 5, 64, dtype=dtype),
            values(64, dtype=dtype),
        )
        for r in (None, residual):
            a = RmsNormArgs(x, weight, 1e-5, r)
            found[f"rms_norm {dtype} {r is None}"] = a, small_ops.rms_norm(x, weight, 1e-5, r, A2)
        found[f"swiglu {dtype}"] = SwigluArgs(x), small_ops.swiglu(x, A2)
        for pairs in (False, True):
            heads = values(4, 3, 128, dtype=dtype)
            b = RotaryArgs(heads, COS, SIN, POSITIONS, pairs)
            found[f"rotary {dtype} {pairs}"] = b, small_ops.rotary(heads, COS, SIN, POSITIONS, pairs, A2)
    mixed = RmsNormArgs(values(5, 64), values(64, dtype=FLOAT), 1e-5)
    found["rms_norm, weight float32"] = mixed, small_ops.rms_norm(*mixed[:3], None, A2)
    old = RmsNormArgs(values(5, 64), values(64), 1e-5, values(5, 64, seed=2))
    found["rms_norm on 310p"] = old, small_ops.rms_norm(*old, P310)
    turned = RotaryArgs(values(4, 3, 128), COS, SIN, POSITIONS)
    found["rotary on 910a"] = turned, small_ops.rotary(*turned, A910)
    found["append"] = append(A2)
    found["append, NZ"] = append(P310, layout="npu_nz")
    for name, w in {
        "grouped": make("int8", 40, 128, group=32, mins=False),
        "per channel with bias": make("int8", 40, 96, group=96, mins=False, bias=HALF),
    }.items():
        x = values(7, w.shape[1])
        found[f"linear, {name}"] = LinearArgs(x, w), linear(w, x)
    return found


@pytest.mark.parametrize("name", choices())
def test_what_is_called_computes_what_was_asked(name):
    record, choice = choices()[name]
    assert isinstance(choice, Invocation), choice
    assert faults(choice) == []
    found = choice.finish(outputs(choice))
    op = {RmsNormArgs: "rms_norm", SwigluArgs: "swiglu", RotaryArgs: "rotary", LinearArgs: "linear"}.get(
        type(record)
    )
    if op is None:
        keys, wanted = record.k_cache, reference_ops.append_kv(record._replace(k_cache=record.k_cache * 0))[0]
        if "NZ" in name:
            keys = plain_pages(keys)
        assert torch.equal(keys.double(), wanted)
        return
    exact, plain = getattr(reference_ops, op)(record), getattr(torch_ops, op)(record)
    pairs = zip(found, plain, exact, strict=True) if isinstance(found, tuple) else ((found, plain, exact),)
    for ours, same, true in pairs:
        if ours is not None:
            assert_accurate(ours, same, true.double())


def test_validator_finds_what_schemas_miss():
    rotary = choices()[f"rotary {HALF} False"][1]
    flat = rotary._replace(args=tuple(t[0] for t in rotary.args))
    assert any("dimensions of input: 3" in f for f in faults(flat))


REASONS = {
    "no operator": (lambda: small_ops.swiglu(values(2, 8), P310), "npu_swiglu does not exist on 310p"),
    "mixed norm": (
        lambda: small_ops.rms_norm(values(2, 8), values(8, dtype=FLOAT), 1e-5, values(2, 8), A2),
        "weight",
    ),
    "bfloat16 on 310p": (
        lambda: small_ops.rms_norm(values(2, 32, dtype=BF16), values(32), 1e-5, None, P310),
        "dtype",
    ),
    "short rows on 310p": (
        lambda: small_ops.rms_norm(values(2, 8), values(8), 1e-5, None, P310),
        "at least 32 bytes",
    ),
    "partial rotary": (
        lambda: small_ops.rotary(values(4, 3, 160), COS, SIN, POSITIONS, False, A2),
        "turns all",
    ),
    "pairs on 910a": (
        lambda: small_ops.rotary(values(4, 3, 128), COS, SIN, POSITIONS, True, A910),
        "interleaved",
    ),
    "nhd on 310p": (lambda: append(P310)[1], "kv_layout"),
    "NZ on 910b": (lambda: append(A2, layout="npu_nz")[1], "kv_layout"),
    "float32 cache": (lambda: append(A2, FLOAT)[1], "dtypes"),
    "strided cache": (
        lambda: small_ops.append_kv(
            values(2, 16, 4, 32)[:, :, :2],
            values(2, 16, 2, 32),
            values(4, 2, 32),
            values(4, 2, 32),
            SLOTS,
            "nhd",
            A2,
        ),
        "k_cache, v_cache: strides",
    ),
    "nothing to write": (lambda: append(A2, slots=torch.full((4,), -1))[1], "none is written"),
    "offsets": (lambda: linear(make("int8", 8, 64), values(2, 64)), "mins"),
    "odd groups": (lambda: linear(make("int8", 8, 64, group=16, mins=False), values(2, 64)), "group_size"),
    "bfloat16 scales": (lambda: linear(make("int8", 8, 64, mins=False), values(2, 64, dtype=BF16)), "scales"),
    "wide": (
        lambda: linear(make("int8", 1, 65536, group=65536, mins=False), values(1, 65536)),
        "at most 65535",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_limits_are_reasons(name):
    call, text = REASONS[name]
    choice = call()
    assert isinstance(choice, str)
    assert text in choice


@pytest.mark.toolchain
def test_calls_match_torch_npus_schemas():
    invocations = [choice for _, choice in choices().values()]
    for i, answer in zip(invocations, ask(invocations), strict=True):
        assert "error" not in answer, (i.name, answer)
        real = outputs(i)
        if real is not None and answer["meta"]:
            real = real if isinstance(real, tuple) else (real,)
            found = [(tuple(shape), dtype) for shape, dtype in answer["outputs"]]
            assert [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in real] == found, i.name
