"""Rows of a packed weight on every runner, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastattn import ops as public
from fastattn import reference_ops
from fastattn.quant import packed
from fastattn.spec import EmbeddingArgs
from tests.ops.runners import FLOATS, assert_accurate, run
from tests.ops.weights import make

DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).replace("torch.", ""))
KINDS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4 cut at 16 float32": {"offset": 16, "scale_dtype": torch.float32},
    "int4 g_idx": {"g_idx": True},
    "int8": {},
    "int8 no mins": {"mins": False},
    "int8 x_perm": {"x_perm": True},
    "float32": {},
    "float16": {},
    "bfloat16": {},
}
IDS: dict[str, list[int]] = {"some": [6, 0, 6, 3], "one": [5], "none": [], "all": list(range(7)) * 30}


@DTYPES
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_embedding(ops, kind, ids, dtype):
    w = make(kind.split()[0], 7, 96, **KINDS[kind])
    args = EmbeddingArgs(torch.tensor(IDS[ids], dtype=torch.int64), w, dtype)
    if args.features() - ops["embedding"].features:
        assert "x_perm" in args.features()
        return
    found = run(ops, "embedding", args)
    assert found.dtype == dtype
    assert_accurate(found, packed.rows(w, args.ids, dtype), reference_ops.embedding(args))


def test_strided_ids_and_a_cut_weight(ops):
    w = packed.slice_in(make("int4", 9, 192), 48, 160)
    args = EmbeddingArgs(torch.arange(16)[::3], packed.slice_out(w, 1, 8), torch.float32)
    args = args._replace(ids=args.ids % 7)
    found = run(ops, "embedding", args)
    assert_accurate(found, packed.rows(args.weight, args.ids), reference_ops.embedding(args))


@pytest.mark.parametrize("bad", [-1, 7])
def test_ids_outside_are_refused(ops, bad):
    args = EmbeddingArgs(torch.tensor([0, bad]), make("int8", 7, 32), torch.float32)
    with pytest.raises(ValueError, match=f"ids: value.*{bad}.*expected 0"):
        run(ops, "embedding", args)


@pytest.mark.parametrize("ids", [torch.tensor([[1]]), torch.tensor(1), torch.tensor([1], dtype=torch.int32)])
def test_ids_that_are_no_vector_of_int64(ids):
    with pytest.raises(ValueError, match=r"ids: torch\.int"):
        public.embedding(ids, make("int8", 7, 32))
