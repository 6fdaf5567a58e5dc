"""The tests of every op, run on the Triton kernels: interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F

from fastattn import reference_ops
from fastattn.quant.packed import dequantize
from fastattn.spec import LinearArgs, Op
from tests.ops import test_linear as test_linear_module
from tests.ops.runners import FLOATS, assert_accurate, random
from tests.ops.test_embedding import (  # noqa: F401
    test_embedding,
    test_ids_outside_are_refused,
    test_strided_ids_and_a_cut_weight,
)
from tests.ops.test_linear import (  # noqa: F401
    FORMATS,
    test_linear,
    test_pieces_of_a_matrix_sum_to_the_whole,
    test_shapes_of_the_weight,
    test_strided_input_and_a_cut_weight,
)
from tests.ops.test_linear_many import test_no_elements  # noqa: F401
from tests.ops.test_norm_gate import (  # noqa: F401
    test_rms_norm,
    test_rms_norm_of_heads_inside_a_fused_projection,
    test_swiglu,
    test_swiglu_of_strided_rows_and_extreme_gates,
)
from tests.ops.test_rotary_append import (  # noqa: F401
    test_a_position_past_the_table_is_refused,
    test_a_slot_past_the_cache_is_refused_before_anything_is_written,
    test_append,
    test_append_of_nothing_changes_nothing,
    test_rotary,
    test_rotary_of_heads_inside_a_fused_projection,
)
from tests.ops.weights import make

pytestmark = [pytest.mark.toolchain, pytest.mark.emulate("triton")]


@pytest.mark.parametrize("inn", [1, 15, 31, 33, 64, 65, 2080])
@pytest.mark.parametrize("kind", ["int8", "int8 g16 float32", "int4 cut at 5"])
def test_widths_that_are_no_whole_step(ops: Mapping[str, Op], inn: int, kind: str) -> None:
    w = test_linear_module.weight(kind, 70, inn)
    for rows in (1, 20, 130):
        test_linear_module.check(ops, w, random(rows, w.shape[1], seed=rows, dtype=torch.float16))


#: Formats that the kernel for many rows does not take: steps with columns of several groups.
BY_SLABS = {"int4 g16", "int4 cut at 16", "int4 cut at 5", "int8 g16 float32", "int8 cut at 7 bias"}


@pytest.mark.parametrize("kind", [name for name in FORMATS if name.startswith("int")])
def test_many_rows(ops: Mapping[str, Op], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format goes the way that suits it, also where tiles are cut at every end."""
    from fastattn.triton_ops import linear

    ran: list[str] = []
    for name in ("run_many", "_through_slabs"):
        way = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *args, name=name, way=way: (ran.append(name), way(*args))[1])
    for dtype, (rows, out, inn) in zip(FLOATS, ((129, 1, 96), (130, 70, 257), (257, 130, 160)), strict=True):
        w = test_linear_module.weight(kind, out, inn)
        test_linear_module.check(ops, w, random(rows, w.shape[1], seed=rows, dtype=dtype))
        by_slabs = kind in BY_SLABS or "g_idx" in kind or dtype == torch.float32
        assert ran.pop() == ("_through_slabs" if by_slabs else "run_many")


@pytest.mark.parametrize("block_m", [64, 128, 256])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_one_group_of_any_width_is_one_product(fmt: str, block_m: int) -> None:
    """By tiles as high as a GPU gets them: few programs make the interpreted ones 64 rows."""
    from fastattn.triton_ops.linear import many_rows_tile, run_many

    for rows, out, inn, offset in ((130, 70, 257, 0), (257, 3, 31, 9), (65, 129, 96, 31), (300, 1, 1, 0)):
        columns = (inn + 31) // 32 * 32 if fmt == "int4" else inn
        group = (columns + offset + 15) // 16 * 16
        w = make(fmt, out, columns, group=group, offset=offset, mins=rows != 65)
        x = random(rows, columns, seed=rows, dtype=torch.float16)
        tile = many_rows_tile(x, w)
        assert tile is not None
        assert tile.block_k == (32 if columns % 16 else 128), "one group does not cut steps"
        ours = run_many(x, w, tile._replace(block_m=block_m))
        plain = (x.float() @ dequantize(w, torch.float32).T).half()
        assert_accurate(ours, plain, reference_ops.linear(LinearArgs(x, w)))


@pytest.mark.parametrize("kind", ["int4", "int8 no mins", "int8 cut at 32"])
def test_high_tiles_of_many_groups(kind: str) -> None:
    from fastattn.triton_ops.linear import many_rows_tile, run_many

    options = {"int8 cut at 32": {"group": 64, "offset": 32}}.get(kind, FORMATS.get(kind, {}))
    w = make(kind.split(maxsplit=1)[0], 130, 160, bias=torch.float32, **options)
    for rows, dtype in ((257, torch.float16), (129, torch.bfloat16)):
        x = random(rows, 160, seed=rows, dtype=dtype)
        tile = many_rows_tile(x, w)
        assert tile is not None
        ways = [run_many(x, w, tile._replace(block_m=m)) for m in (64, 128, 256)]
        plain = F.linear(*(t.float() for t in (x, dequantize(w, torch.float32), w.bias))).to(dtype)
        for ours in ways:
            assert_accurate(ours, plain, reference_ops.linear(LinearArgs(x, w)))


def test_slabs_fill_the_gpu_or_stay_in_its_cache() -> None:
    from fastattn.triton_ops.device import CHIPS
    from fastattn.triton_ops.linear import slab_rows

    h100 = CHIPS["H100"]
    assert slab_rows(1024, 28672, h100) == 17 * 128  # 8 blocks high: 136 for 132 processors
    assert slab_rows(1024, 4096, h100) == 17 * 128
    assert slab_rows(8192, 1024, h100) == 8192  # 8M values
    assert slab_rows(17, 11008, CHIPS["T4"]) == 40 * 128
