"""The small ops' kernels, interpreted: what every backend's ops are tested for, on the backend `ascend`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import pytest
import torch

from ascend_ops.ops import linear_blocks
from fastattn import reference_ops
from fastattn.backends.ascend_small import kernel_weight
from fastattn.dispatch import op_table, unavailable
from fastattn.quant import packed
from fastattn.spec import EmbeddingArgs, Op, RotaryArgs
from tests.ops import test_embedding as embedding_tests
from tests.ops import test_linear as linear_tests
from tests.ops import test_norm_gate as norm_tests
from tests.ops import test_rotary_append as rotary_tests
from tests.ops.runners import FLOATS, assert_accurate, random, run
from tests.ops.weights import make

pytestmark = [pytest.mark.emulate("ascend"), pytest.mark.toolchain]


@pytest.fixture
def ops() -> Mapping[str, Op]:
    """The Ascend backend's; in the process that only reports what the emulating one found, none."""
    return {} if unavailable("ascend") else op_table("ascend")


test_ids_outside_are_refused = embedding_tests.test_ids_outside_are_refused
test_rows_of_a_cut_weight = embedding_tests.test_strided_ids_and_a_cut_weight
test_float16_never_passes_through_bfloat16 = linear_tests.test_float16_never_passes_through_bfloat16
test_pieces_of_a_matrix_sum_to_the_whole = linear_tests.test_pieces_of_a_matrix_sum_to_the_whole
test_strided_input_and_a_cut_weight = linear_tests.test_strided_input_and_a_cut_weight
test_rms_norm = norm_tests.test_rms_norm
test_rms_norm_of_heads_inside_a_fused_projection = norm_tests.test_rms_norm_of_heads_inside_a_fused_projection
test_swiglu = norm_tests.test_swiglu
test_swiglu_of_strided_rows_and_extreme_gates = norm_tests.test_swiglu_of_strided_rows_and_extreme_gates
test_append = rotary_tests.test_append
test_append_of_nothing_changes_nothing = rotary_tests.test_append_of_nothing_changes_nothing
test_rotary_of_heads_inside_a_projection = rotary_tests.test_rotary_of_heads_inside_a_fused_projection
test_a_position_past_the_table_is_refused = rotary_tests.test_a_position_past_the_table_is_refused
test_a_slot_past_the_cache_is_refused = (
    rotary_tests.test_a_slot_past_the_cache_is_refused_before_anything_is_written
)


@pytest.mark.parametrize(
    ("kind", "dtype"), list(zip(linear_tests.FORMATS, cycle(FLOATS), strict=False)), ids=str
)
def test_linear(ops, kind, dtype):
    w = linear_tests.weight(kind, 37, 203)
    for rows in (0, 1, 3, 65):
        linear_tests.check(ops, w, random(rows, w.shape[1], seed=rows, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 32), (65, 64), (5, 1024), (130, 288)], ids=str)
@pytest.mark.parametrize("kind", ["int4 g128 float32", "int8 no mins", "bfloat16 x_perm bias"])
def test_shapes_of_the_weight(ops, kind, shape):
    w = linear_tests.weight(kind, *shape)
    linear_tests.check(ops, w, random(5, w.shape[1], seed=1, dtype=torch.float16))


def test_tiles_of_one_group():
    """What lets a tile read one scale a row: whole groups, uncut; act-order and odd groups gather."""
    expected = {
        "int4 g128 float32": (64, True),
        "int4": (16, True),
        "int8": (32, True),
        "int4 g16": (32, False),
    }
    expected |= {"int4 g_idx": (32, False), "int4 cut at 16": (32, False), "int4 cut at 32": (16, True)}
    for kind, wanted in expected.items():
        assert linear_blocks(kernel_weight(linear_tests.weight(kind, 8, 256)), 1)[2:] == wanted, kind


@pytest.mark.parametrize(
    ("kind", "dtype"), list(zip(embedding_tests.KINDS, cycle(FLOATS), strict=False)), ids=str
)
def test_embedding(ops, kind, dtype):
    w = make(kind.split()[0], 7, 96, **embedding_tests.KINDS[kind])
    for ids in ([6, 0, 6, 3], []):
        args = EmbeddingArgs(torch.tensor(ids, dtype=torch.int64), w, dtype)
        found = run(ops, "embedding", args)
        assert_accurate(found, packed.rows(w, args.ids, dtype), reference_ops.embedding(args))


@rotary_tests.STYLES
@pytest.mark.parametrize(("shape", "rotary_dim"), [s for s in rotary_tests.SHAPES if s[0][0] < 100], ids=str)
def test_rotary(ops, interleaved, shape, rotary_dim):
    dtype = FLOATS[shape[0] % 3]
    x = random(*shape, seed=1, dtype=dtype)
    cos, sin = rotary_tests.angles(rotary_dim)
    positions = torch.randint(0, 50, (shape[0],), generator=torch.Generator().manual_seed(2))
    args = RotaryArgs(x, cos, sin, positions, interleaved)
    ours = run(ops, "rotary", args)
    plain = rotary_tests.plain_rotary(x, cos, sin, positions, interleaved)
    assert_accurate(ours, plain, reference_ops.rotary(args))
    assert torch.equal(ours[..., rotary_dim:], x[..., rotary_dim:])
