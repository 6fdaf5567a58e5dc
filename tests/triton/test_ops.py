"""The tests of every op, run on the Triton kernels: interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from fastattn.spec import Op
from tests.ops import test_linear as test_linear_module
from tests.ops.runners import random
from tests.ops.test_embedding import (  # noqa: F401
    test_embedding,
    test_ids_outside_are_refused,
    test_strided_ids_and_a_cut_weight,
)
from tests.ops.test_linear import (  # noqa: F401
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

pytestmark = [pytest.mark.toolchain, pytest.mark.emulate("triton")]


@pytest.mark.parametrize("inn", [1, 15, 31, 33, 64, 65, 2080])
@pytest.mark.parametrize("kind", ["int8", "int8 g16 float32", "int4 cut at 5"])
def test_widths_that_are_no_whole_step(ops: Mapping[str, Op], inn: int, kind: str) -> None:
    w = test_linear_module.weight(kind, 70, inn)
    for rows in (1, 20, 130):
        test_linear_module.check(ops, w, random(rows, w.shape[1], seed=rows, dtype=torch.float16))
