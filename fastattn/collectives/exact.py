"""The policy `exact`: one all-reduce of the whole partial result at each sync point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..spec import Epilogue, Link, Point, Produce, Rates, Stream, TPGroup
from .exchange import Pending, all_reduce

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExactWork:
    """A `spec.Work`: the sum under way, then residual, bias and norm."""

    def __init__(self, pending: Pending, total: Tensor, stream: Stream, epilogue: Epilogue) -> None:
        self._pending, self._total, self._stream, self._epilogue = pending, total, stream, epilogue

    def wait(self) -> Stream:
        self._pending.wait()
        total = self._total if self._epilogue.bias is None else self._total + self._epilogue.bias
        if self._epilogue.norm is None:
            return Stream(self._stream.residual + total, None)
        hidden, residual = self._epilogue.norm(total, self._stream.residual)
        return Stream(residual, hidden)

    def cancel(self) -> None:
        self._pending.cancel()


@dataclass(frozen=True)
class Exact:
    """``residual + bias + sum over ranks of (partial + pending)``, summed in the activations' dtype.

    ``item_bytes`` is the size of one activation on the wire, for `wire_bytes`: 2 for 16-bit models.
    """

    item_bytes: int = 4

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    scatters: ClassVar[bool] = False
    needs_full_residual: ClassVar[bool] = True

    def reasons(self, p: Point, rows: int, hidden: int, dtype: torch.dtype, g: TPGroup) -> list[str]:
        """[] if the policy can run at point ``p``."""
        if dtype in _DTYPES or g.world == 1:
            return []
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        return [f"dtype {str(dtype).removeprefix('torch.')} cannot be summed on the wire, only {names}"]

    def start(self, p: Point, make: Produce, s: Stream, e: Epilogue, g: TPGroup) -> ExactWork:
        """Computes this rank's partial result of all rows and starts its sum.

        The sum overwrites the tensor that ``make.partial`` returned.
        """
        if s.rows is not None:
            raise ValueError(f"{p}: the residual is scattered to rows {s.rows}, policy exact needs all rows")
        total = make.partial(0, make.rows)
        if s.pending is not None:
            total = total + s.pending
        return ExactWork(all_reduce(g, total, str(p)), total, s, e)

    def seconds(self, rows: int, hidden: int, link: Link, rate: Rates) -> float:
        """Ring all-reduce: 2 (N - 1) steps, each one hop and one N-th of the bytes."""
        if rate.world == 1:
            return 0.0
        chunk = -(-rows * hidden // rate.world) * rate.item_bytes
        return 2 * (rate.world - 1) * (link.latency_s + chunk / link.bytes_per_s)

    def wire_bytes(self, rows: int, hidden: int, world: int) -> int:
        """Bytes that each rank sends: 2 (N - 1) chunks of one N-th."""
        return 2 * (world - 1) * -(-rows * hidden // world) * self.item_bytes
