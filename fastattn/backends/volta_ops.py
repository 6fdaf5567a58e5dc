"""The small ops of the Volta backend, adapted from `cuda_volta`."""

from __future__ import annotations

from ..spec import Op

OPS: dict[str, Op] = {}
