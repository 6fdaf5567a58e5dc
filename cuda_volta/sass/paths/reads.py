"""What special registers, other lanes, constants and memory give."""

from __future__ import annotations

import numpy as np

from cuda_volta.sass.paths import operands as ops
from cuda_volta.sass.paths.form import Form, Step, store
from cuda_volta.sass.paths.lanes import UNKNOWN, WARP, ZERO, Value, known, select, uniform
from cuda_volta.sass.paths.warp import Warp


def special(form: Form) -> Step:
    name = form.item.operands[1]
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        value = ZERO if name == "SRZ" else warp.special.get(name, UNKNOWN)
        for number in range(first, first + count):
            warp.set(number, value if number == first or name == "SRZ" else UNKNOWN, mask)

    return run


def shuffle(form: Form) -> Step:
    """Lane numbers within the segments that the third operand's mask cuts (PTX ISA, shfl.sync)."""
    value, lane, clamp = form.data[:3]
    mode = form.item.modifiers[0]

    def run(warp: Warp) -> Value:
        data, b, c = value(warp), lane(warp), clamp(warp)
        if not known(data, b, c):
            return UNKNOWN
        own, segment = np.arange(WARP), (c >> 8) & 31
        least, most = own & segment, (own & segment) | (c & 31 & ~segment)
        b = b & 31
        source = {"IDX": least | (b & ~segment), "BFLY": own ^ b, "UP": own - b, "DOWN": own + b}[mode]
        inside = source >= most if mode == "UP" else source <= most
        return data[np.where(inside, source, own) & 31]

    return store(form, run)


def vote(form: Form) -> Step:
    mode = form.item.modifiers[0]

    def run(warp: Warp, mask: Value) -> None:
        asked = form.conditions[-1](warp)
        ballot: Value = UNKNOWN
        answer: Value = UNKNOWN
        if known(asked, mask):
            votes = asked & mask
            ballot = uniform(sum(1 << i for i in range(WARP) if votes[i]))
            whole = {"ANY": votes.any(), "ALL": (asked | ~mask).all()}.get(
                mode, not votes.any() or (asked | ~mask).all()
            )
            answer = np.full(WARP, bool(whole))
        if form.register:
            warp.set(form.register[0], ballot, mask)
        for number in form.written:
            warp.set_predicate(number, answer, mask)

    return run


def load_constant(form: Form) -> Step:
    bank, offset = ops.constant_address(form.item.operands[1])
    size = next((int(m[1:]) // 8 for m in form.item.modifiers if m in ("U8", "U16")), 4)
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        for word in range(count):
            warp.set(first + word, warp.load_constant(bank, offset(warp) + 4 * word, size), mask)

    return run


def load_global(form: Form) -> Step:
    at = ops.address(form.item)
    size = next((int(m[1:]) // 8 for m in form.item.modifiers if m in ("U8", "U16")), 4)
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        for word in range(count):
            warp.set(first + word, warp.load_global(at(warp) + 4 * word, size), mask)

    return run


def load_local(form: Form) -> Step:
    at = ops.address(form.item)
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        where = at(warp)
        for word in range(count):
            value = UNKNOWN if where is UNKNOWN else warp.local.get(int(where[0]) + 4 * word, UNKNOWN)
            warp.set(first + word, value, mask)

    return run


def store_local(form: Form) -> Step:
    at = ops.address(form.item)
    count = 2 if form.has("64") else 4 if form.has("128") else 1
    found = ops.REGISTER.fullmatch(form.item.operands[1].removesuffix(".reuse"))

    def run(warp: Warp, mask: Value) -> None:
        where = at(warp)
        if where is UNKNOWN:
            warp.local.clear()
            return
        for word in range(count):
            value = warp.registers[int(found[1]) + word] if found else ZERO
            key = int(where[0]) + 4 * word
            warp.local[key] = select(mask, value, warp.local.get(key, ZERO))

    return run
