"""What logic, comparisons, selections and moves of predicates compute."""

from __future__ import annotations

import operator
import re

import numpy as np

from cuda_volta.sass.paths import operands as ops
from cuda_volta.sass.paths.form import Form, Step, forget, integers, store
from cuda_volta.sass.paths.lanes import MASK, TRUE, UNKNOWN, ZERO, Value, known, select, signed
from cuda_volta.sass.paths.warp import Warp

_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq,
    "NE": operator.ne,
}  # fmt: skip
_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def logic(form: Form) -> Step:
    a, b, c = form.data[:3]
    table = int(form.texts[3], 16)

    def run(warp: Warp) -> Value:
        x, y, z = a(warp), b(warp), c(warp)
        total = ZERO
        for row in range(8):
            if table >> row & 1:
                total = total | (
                    (x if row & 4 else MASK ^ x) & (y if row & 2 else MASK ^ y) & (z if row & 1 else MASK ^ z)
                )
        return total

    return store(form, run, lambda v: v != 0)


def predicate_logic(form: Form) -> Step:
    a, b, c = form.conditions[:3]
    tables = [int(t, 16) for t in form.texts if not ops.is_predicate(t)]
    names = form.item.operands[:2]

    def value(warp: Warp, table: int) -> Value:
        x, y, z = a(warp), b(warp), c(warp)
        total: Value = ~TRUE
        for row in range(8):
            if table >> row & 1:
                total = total | ((x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z))
        return total

    def run(warp: Warp, mask: Value) -> None:
        results = [value(warp, table) for table in tables]
        for name, result in zip(names, results, strict=False):
            if name != "PT":
                warp.set_predicate(int(name[1:]), result, mask)

    return run


def compare(form: Form) -> Step:
    names, modifiers = form.item.operands[:2], form.item.modifiers
    test, combine = _COMPARE[modifiers[0]], _COMBINE[next(m for m in modifiers if m in _COMBINE)]
    a, b = form.data[:2]
    cast = integers(form)

    def run(warp: Warp, mask: Value) -> None:
        x, y = cast(a(warp)), cast(b(warp))
        holds = test(x, y)
        if form.has(
            "EX"
        ):  # the upper half of a 64-bit comparison: the lower half's result where these are equal
            lower = form.conditions[1](warp)
            same = x == y
            if modifiers[0] == "NE":
                holds = holds | lower
            elif modifiers[0] == "EQ":
                holds = holds & lower
            else:
                holds = (holds & ~same) | (same & lower)
        chained = form.conditions[0](warp)
        for name, value in zip(names, (holds, ~holds), strict=True):
            if name != "PT":
                warp.set_predicate(int(name[1:]), combine(value, chained), mask)

    return run


def compare_floats(form: Form) -> Step:
    """FSETP: a comparison whose name ends in U also holds for NaN."""
    names, modifiers = form.item.operands[:2], form.item.modifiers
    test = _COMPARE.get(modifiers[0].removesuffix("U"))
    if test is None:
        return forget(form)
    unordered, combine = modifiers[0].endswith("U"), _COMBINE[next(m for m in modifiers if m in _COMBINE)]
    a, b = (ops.single(text) for text in form.texts[:2])

    def run(warp: Warp, mask: Value) -> None:
        x, y = a(warp), b(warp)
        holds: Value = UNKNOWN
        if known(x, y):
            unclear = np.isnan(x) | np.isnan(y)
            holds = (test(x, y) & ~unclear) | (unclear & unordered)
        chained = form.conditions[0](warp)
        for name, value in zip(names, (holds, ~holds), strict=True):
            if name != "PT":
                warp.set_predicate(int(name[1:]), combine(value, chained), mask)

    return run


def choose(form: Form) -> Step:
    return store(form, lambda w: select(form.conditions[0](w), form.data[0](w), form.data[1](w)))


def permute(form: Form) -> Step:
    a, selector, b = form.data[:3]
    if form.item.modifiers:
        return forget(form)

    def run(warp: Warp) -> Value:
        low, chosen, up = a(warp), selector(warp), b(warp)
        if not known(low, chosen, up):
            return UNKNOWN
        pair = (low & MASK) + (signed(up) << 32)
        total = ZERO
        for byte in range(4):
            nibble = (chosen >> (4 * byte)) & 15
            value = (pair >> (8 * (nibble & 7))) & 255
            total = total + (np.where(nibble & 8, (value >> 7) * 255, value) << (8 * byte))
        return total

    return store(form, run)


def to_register(form: Form) -> Step:
    """P2R: the predicates under a mask into a byte of a register."""
    shift = next((8 * int(m[1]) for t in form.item.operands for m in re.findall(r"\.(B\d)", t)), 0)
    base = ops.source(re.sub(r"\.B\d", "", form.texts[1]))
    chosen = int(form.texts[2], 16)

    def run(warp: Warp) -> Value:
        others = base(warp) & (MASK ^ chosen << shift)
        return others | (warp.packed_predicates(chosen) << shift)

    return store(form, run)


def to_predicates(form: Form) -> Step:
    """R2P: a byte of a register into the predicates under a mask."""
    text, chosen = form.item.operands[1], int(form.item.operands[2], 16)
    shift = next((8 * int(m[1]) for m in re.findall(r"\.(B\d)", text)), 0)
    base = ops.source(re.sub(r"\.B\d", "", text))

    def run(warp: Warp, mask: Value) -> None:
        value = base(warp)
        for number in range(7):
            if chosen >> number & 1:
                bit = UNKNOWN if value is UNKNOWN else ((value >> (shift + number)) & 1) != 0
                warp.set_predicate(number, bit, mask)

    return run
