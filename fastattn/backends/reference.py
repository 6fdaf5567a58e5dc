"""The float64 oracle as a backend: any call, any device, slowly. Used only by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..indices import check_indices
from ..spec import AttentionArgs, Backend, Op


def _attention(a: AttentionArgs) -> tuple[Tensor, Tensor]:
    from .. import reference

    check_indices(a)
    out, lse = reference.attention(a)
    return out.to(a.q.dtype), lse.float() if a.return_lse else lse.new_empty((0,), dtype=torch.float32)


def _attention_reasons(signature: object) -> list[str]:
    layout = getattr(signature, "kv_layout", "nhd")
    return [] if layout == "nhd" else [f"kv_layout {layout!r}"]


def _ops() -> Mapping[str, Op]:
    from .. import reference_ops

    features = frozenset(AttentionArgs._field_defaults) - {"kv_layout"}
    return {"attention": Op(_attention, features, _attention_reasons), **reference_ops.OPS}


BACKEND = Backend(
    name="reference",
    device_types=("cpu", "cuda", "npu"),
    available=list,
    ops=_ops,
    describe=lambda: {"precision": "float64", "use": "by name only"},
)
