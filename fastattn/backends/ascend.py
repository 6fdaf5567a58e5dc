"""Ascend NPUs: torch_npu's operators where one can run the call, our Triton-Ascend kernels for the rest."""

from __future__ import annotations

from ascend_ops.router import AttentionCall

from ..spec import AttentionArgs, Backend


def router_call(a: AttentionArgs) -> AttentionCall:
    """The call as `ascend_ops` sees it."""
    left, right = a.bounds()
    shared = {name: getattr(a, name) for name in AttentionCall._fields if name in a._fields}
    return AttentionCall(**shared | {"left": left, "right": right})


BACKEND = Backend("ascend", ("npu",), lambda: ["not yet"], ops=dict, describe=dict)
