"""An instruction taken apart, and how its results are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cuda_volta.sass.listing import Instruction
from cuda_volta.sass.paths import operands as ops
from cuda_volta.sass.paths.lanes import MASK, UNKNOWN, ZERO, Value, signed
from cuda_volta.sass.paths.warp import Warp

Step = Callable[[Warp, Value], None]  # (state, lanes that execute it)


class Form:
    """One instruction taken apart: destinations and a fetch for each source."""

    def __init__(self, item: Instruction) -> None:
        self.item = item
        self.register, self.written, count = ops.destinations(item)
        self.texts = item.operands[count:]
        self.data = [ops.source(t) for t in self.texts if not ops.is_predicate(t)]
        self.conditions = [ops.predicate(t) for t in self.texts if ops.is_predicate(t)]

    def has(self, modifier: str) -> bool:
        return modifier in self.item.modifiers

    def carry_in(self, warp: Warp) -> Value:
        """The sum of an .X form's carries."""
        total: Value = ZERO
        for condition in self.conditions if self.has("X") else []:
            value = condition(warp)
            total = total + (UNKNOWN if value is UNKNOWN else value.astype(np.int64))
        return total


def forget(form: Form) -> Step:
    """Its results are unknown."""
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        for number in range(first, first + count):
            warp.set(number, UNKNOWN, mask)
        for number in form.written:
            warp.set_predicate(number, UNKNOWN, mask)

    return run


def store(form: Form, value: Callable[[Warp], Value], carry: Callable[[Value], Value] | None = None) -> Step:
    """Writes the low 32 bits of a value, and its carry as a predicate if there is one to write."""

    def run(warp: Warp, mask: Value) -> None:
        full = value(warp)
        if form.register:
            warp.set(form.register[0], full & MASK, mask)
        for number in form.written:
            warp.set_predicate(number, UNKNOWN if carry is None or full is UNKNOWN else carry(full), mask)

    return run


def integers(form: Form) -> Callable[[Value], Value]:
    """How a comparison or product reads 32 bits: with a sign, unless the instruction has .U32."""
    return (lambda v: v & MASK) if form.has("U32") else (lambda v: signed(v & MASK))
