"""Every kernel but attention's compiles for GPUs that are not here, and spills nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.backends.interpreter import interpreting
from fastattn.quant.codec import Codec
from fastattn.quant.packed import slice_in
from fastattn.spec import (
    AppendKvArgs,
    DecodeSumArgs,
    EmbeddingArgs,
    EncodeArgs,
    LinearArgs,
    PackedWeight,
    RmsNormArgs,
    RotaryArgs,
    SwigluArgs,
)
from fastattn.triton_ops.device import CHIPS
from tests.ops.weights import make

pytestmark = pytest.mark.toolchain
META = torch.device("meta")
#: Triton compiles no tensor-core product for sm_75: registers hold what it multiplies (docs/triton.md).
SPILLS = {"T4": 4096}


@pytest.fixture(autouse=True, scope="module")
def compiling() -> None:
    pytest.importorskip("triton")
    if interpreting():
        pytest.skip("Triton interprets in this process")


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def weight(fmt: str, out: int, inn: int, **options: Any) -> PackedWeight:
    w = make(fmt, out, inn, **options)
    on_meta = {name: t.to(META) for name, t in w.tensors.items()}
    moved = {n: getattr(w, n) for n in ("g_idx", "x_perm", "bias")}
    return w._replace(tensors=on_meta, **{n: None if t is None else t.to(META) for n, t in moved.items()})


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    return empty(4096, 64, dtype=torch.float32), empty(4096, 64, dtype=torch.float32)


def long(n: int) -> torch.Tensor:
    return empty(n, dtype=torch.int64)


def _append(**options: Any) -> AppendKvArgs:
    caches = empty(64, 16, 8, 128), empty(64, 16, 8, 128)
    return AppendKvArgs(*caches, empty(7, 8, 128), empty(7, 8, 128), long(7), **options)


def _encoded(codec: Codec, rows: int, hidden: int) -> EncodeArgs:
    c = codec
    return EncodeArgs(empty(rows, hidden), c.element, c.block, c.scale, c.search, c.rotate, c.outliers)


def _summed(codec: Codec, rows: int, hidden: int) -> DecodeSumArgs:
    c = codec
    messages = (empty(codec.message_bytes(rows, hidden), dtype=torch.uint8),) * 2
    return DecodeSumArgs(
        messages, rows, hidden, torch.float16, c.element, c.block, c.scale, c.rotate, c.outliers
    )


FINE = Codec("int4", 32, "e4m3", True, 64, (3, 99))
CALLS: dict[str, Callable[[], tuple[str, Any]]] = {
    "norm": lambda: ("rms_norm", RmsNormArgs(empty(64, 8192), empty(8192), 1e-5, empty(64, 8192))),
    "norm of heads": lambda: ("rms_norm", RmsNormArgs(empty(64, 32, 128), empty(128), 1e-5)),
    "swiglu": lambda: ("swiglu", SwigluArgs(empty(64, 2 * 11008))),
    "rotary": lambda: ("rotary", RotaryArgs(empty(64, 32, 128), *angles(), long(64))),
    "rotary pairs": lambda: ("rotary", RotaryArgs(empty(64, 32, 128), *angles(), long(64), True)),
    "append": lambda: ("append_kv", _append(cos=angles()[0], sin=angles()[1], positions=long(7))),
    "append plain": lambda: ("append_kv", _append()),
    "embedding": lambda: ("embedding", EmbeddingArgs(long(9), weight("int4", 64, 4096), torch.float16)),
    **{
        f"linear {fmt} {rows} {name}": lambda f=fmt, r=rows, o=options: (  # type: ignore[misc]
            "linear", LinearArgs(empty(r, 4096), weight(f, 512, 4096, **o))
        )
        for fmt in ("int4", "int8")
        for rows in (1, 64)
        for name, options in {
            "g128": {"group": 128}, "g32": {"group": 32}, "g_idx": {"g_idx": True, "group": 128},
        }.items()
    },
    "encode": lambda: ("encode", _encoded(FINE, 64, 4096)),
    "encode plain": lambda: ("encode", _encoded(Codec(), 64, 8192)),
    "decode_sum": lambda: ("decode_sum", _summed(FINE, 64, 4096)),
    "decode_sum plain": lambda: ("decode_sum", _summed(Codec(), 64, 8192)),
}  # fmt: skip


@pytest.mark.parametrize("chip", ["T4", "A100", "H100"])
@pytest.mark.parametrize("call", CALLS)
def test_it_compiles_and_spills_nothing(call: str, chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.backends.triton_ops import OPS
    from fastattn.triton_ops import launch
    from fastattn.triton_ops.offline import compile_for

    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda made, _: launches.extend(made))
    name, args = CALLS[call]()
    monkeypatch.setattr("fastattn.backends.triton_ops.check_indices", lambda *_, **__: None)
    OPS[name].run(args)
    assert launches
    for made in launches:
        report = compile_for(made, CHIPS[chip])
        assert report.spills <= (SPILLS.get(chip, 0) if name == "linear" else 0), made.kernel
        assert report.shared_bytes <= CHIPS[chip].shared_bytes


@pytest.mark.parametrize("chip", ["A100", "H100"])
@pytest.mark.parametrize("call", ["int4 1 g128", "int4 64 g128", "int8 1 g128", "int4 1 g32"])
def test_a_step_takes_one_scale_for_a_row(call: str, chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lane loads the scales and mins of the rows it has, not of each value."""
    from fastattn.triton_ops import launch, linear
    from fastattn.triton_ops.offline import compile_for

    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda made, _: launches.extend(made))
    linear.linear(CALLS[f"linear {call}"]()[1])
    assert compile_for(launches[0], CHIPS[chip]).ptx.count("ld.global") <= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fmt", "group"), [("int4", 128), ("int4", 32), ("int8", 128)])
@pytest.mark.parametrize("chip", ["A100", "L40", "H100"])
def test_many_rows_multiply_what_registers_hold(
    chip: str, fmt: str, group: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W goes from codes to the tensor cores without touching shared memory, and nothing is spilled."""
    from fastattn.triton_ops import launch, linear_many
    from fastattn.triton_ops.linear_tiles import MANY, LinearNeed, fit, linear_tile
    from fastattn.triton_ops.offline import compile_for

    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda made, _: launches.extend(made))
    tile = linear_tile(CHIPS[chip], LinearNeed(MANY, 4))
    assert tile is not None
    x, w = empty(1024, 4096, dtype=dtype), weight(fmt, 4096, 4096, group=group)
    linear_many.run_many(x, w, fit(tile, x, w))
    report = compile_for(launches[0], CHIPS[chip])
    assert report.spills == 0
    assert report.shared_bytes <= CHIPS[chip].shared_bytes
    if chip == "H100":
        products = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (\S)", report.ptx)
        assert products
        assert set(products) == {"{"}, "an operand in registers, not a descriptor"
        assert ("mul.bf16x2" in report.ptx or "fma.rn.f32" in report.ptx) == (dtype == torch.bfloat16)
    else:
        assert "mma.sync.aligned.m16n8k16" in report.ptx


@pytest.mark.parametrize("name", ["A100", "L40", "H100"])
@pytest.mark.parametrize(
    ("begin", "inn", "group"), [(0, 4097, 4112), (0, 4104, 128), (8, 4104, 4112)], ids=str
)
@pytest.mark.parametrize("rows", [1, 64, 1024])
def test_rows_that_begin_anywhere_are_not_spilled(
    rows: int, begin: int, inn: int, group: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tiles are small enough for registers, where each value of theirs arrives by itself.

    The last is a view into longer rows.
    """
    from fastattn.triton_ops import device, launch, linear, linear_few, linear_many
    from fastattn.triton_ops.offline import compile_for

    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda made, _: launches.extend(made))
    for module in (linear, linear_few, linear_many):
        monkeypatch.setattr(module, "chip", lambda _: device.CHIPS[name])
    w = slice_in(weight("int8", 4096, inn, group=group), begin, inn)
    linear.linear(LinearArgs(empty(rows, inn - begin), w))
    report = compile_for(launches[0], device.CHIPS[name])
    assert report.spills == 0
    assert report.shared_bytes <= device.CHIPS[name].shared_bytes
    assert re.search(r"wgmma\.mma_async|mma\.sync", report.ptx), "products of tensor cores"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [576, 8192])
def test_sums_over_symmetric_memory(dtype: torch.dtype, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch's instructions are in the code: multicast needs several GPUs and is only compiled."""
    from fastattn.triton_ops import launch, reduce_norm
    from fastattn.triton_ops.offline import compile_for

    launches: list[launch.Launch] = []
    monkeypatch.setattr(launch, "run", lambda made, _: launches.extend(made))
    residual, w = empty(16, hidden, dtype=dtype), empty(hidden, dtype=dtype)
    reduce_norm.reduce_norm(long(8), 8, dtype, residual, 48, w, 1e-5)
    reduce_norm.multicast_reduce_norm(1 << 40, dtype, residual, 48, w, 1e-5)
    plain, multicast = (compile_for(made, CHIPS["H100"]) for made in launches)
    assert plain.spills == multicast.spills == 0
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    assert f"multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.{kind}" in multicast.ptx
    assert f"multimem.st.relaxed.sys.global.v4.{kind}" in multicast.ptx
    assert compile_for(launches[0], CHIPS["A100"]).spills == 0
    # Rows go to and from the ranks' buffers 16 bytes at a time, and weights and the residual as well.
    assert plain.ptx.count("ld.global.v4.b32") >= 8
    assert not re.search(r"(ld|st)\.global\.b16", plain.ptx)


def test_what_the_switch_cannot_sum_is_refused() -> None:
    from fastattn.triton_ops.reduce_norm import multicast_reduce_norm

    for dtype, hidden, match in (
        (torch.float32, 64, "dtype: torch.float32"),
        (torch.float16, 60, "hidden: 60"),
    ):
        with pytest.raises(ValueError, match=match):
            multicast_reduce_norm(
                0, dtype, empty(2, hidden, dtype=dtype), 0, empty(hidden, dtype=dtype), 1e-5
            )
