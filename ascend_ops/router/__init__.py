"""What of a call torch_npu's own operators can run, which of them, and the exact call.

Nothing here computes: a choice is an `Invocation`, an operator's name with its arguments, so that every call
that can be made is also checked without an NPU, against torch_npu's schemas and against the operators'
documented limits (`validate`). What an operator cannot do is a reason, with the argument and the limit.
"""

from __future__ import annotations

from .attention import Route, empty, route
from .call import AttentionCall, Lengths, host, lengths
from .chips import Chip, chip_of, current
from .invocation import Invocation

__all__ = [
    "AttentionCall",
    "Chip",
    "Invocation",
    "Lengths",
    "Route",
    "chip_of",
    "current",
    "empty",
    "host",
    "lengths",
    "route",
]
