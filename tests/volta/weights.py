"""fastattn's packed weights as the kernels' library takes them."""

from __future__ import annotations

from cuda_volta.weights import GroupedWeight
from fastattn.spec import PackedWeight


def grouped(w: PackedWeight) -> GroupedWeight:
    t = w.tensors
    return GroupedWeight(
        int(w.format.removeprefix("int")), w.shape, t["codes"], t["scales"], t.get("mins"), w.group_size,
        w.group_offset, w.g_idx, w.x_perm, w.bias,
    )  # fmt: skip
