"""What additions, products, shifts and conversions compute."""

from __future__ import annotations

import numpy as np

from cuda_volta.sass.paths import operands as ops
from cuda_volta.sass.paths.form import Form, Step, integers, store
from cuda_volta.sass.paths.lanes import MASK, UNKNOWN, WARP, ZERO, Value, known, signed, unsigned_shift
from cuda_volta.sass.paths.warp import Warp


def _carried(total: Value) -> Value:
    return total > MASK


def mov(form: Form) -> Step:
    return store(form, form.data[0])


def add(form: Form) -> Step:
    return store(form, lambda w: sum((d(w) for d in form.data), ZERO) + form.carry_in(w), _carried)


def imad(form: Form) -> Step:
    a, b, c = form.data[:3]
    cast = integers(form)
    if form.has("WIDE"):
        addend = form.texts[2]
        upper = ops.high(addend)
        register = form.register

        def wide(warp: Warp, mask: Value) -> None:
            low, up = c(warp), upper(warp)
            product = cast(a(warp)) * cast(b(warp))
            total = product + (low + (up << 32) if known(low, up) else UNKNOWN)
            if register:
                warp.set(register[0], total & MASK, mask)
                warp.set(register[0] + 1, (total >> 32) & MASK, mask)
            for number in form.written:
                warp.set_predicate(number, UNKNOWN, mask)

        return wide
    if form.has("HI"):
        return store(form, lambda w: ((cast(a(w)) * cast(b(w))) >> 32) + c(w) + form.carry_in(w))
    return store(form, lambda w: (a(w) & MASK) * (b(w) & MASK) + c(w) + form.carry_in(w))


def lea(form: Form) -> Step:
    shift = int(form.texts[[i for i, t in enumerate(form.texts) if not ops.is_predicate(t)][-1]], 16)
    data = form.data[:-1]
    if not form.has("HI"):
        return store(
            form, lambda w: ((data[0](w) << shift) & MASK) + (data[1](w) & MASK) + form.carry_in(w), _carried
        )

    def high(warp: Warp) -> Value:
        low = data[0](warp) & MASK
        if form.has("SX32"):
            wide = signed(low)
        else:
            up = data[2](warp) & MASK
            wide = low + (up << 32) if known(low, up) else UNKNOWN
        return _shifted_right(wide, 32 - shift, form.has("SX32")) + data[1](warp) + form.carry_in(warp)

    return store(form, high, _carried)


def _shifted_right(value: Value, count: int, arithmetic: bool) -> Value:
    """A right shift of 64 bits by a literal."""
    return value >> count if arithmetic else unsigned_shift(value, np.full(WARP, count, np.int64))


def shift(form: Form) -> Step:
    low, count, up = form.data[:3]
    wide = form.has("U64") or form.has("S64")
    clamp = 63 if wide else 32

    def run(warp: Warp) -> Value:
        a, n, c = low(warp), count(warp), up(warp)
        if not known(a, n, c):
            return UNKNOWN
        n = (n & (clamp if wide else 31)) if form.has("W") else np.minimum(n, clamp)
        value = (a & MASK) + (signed(c) << 32)
        if form.has("L"):
            # A shift by 32 of 32-bit contents leaves nothing; numpy shifts int64 by up to 63.
            moved = value << n
        elif form.has("S32") or form.has("S64"):
            moved = value >> n
        else:
            moved = unsigned_shift(value, n)
        return (moved >> 32) & MASK if form.has("HI") else moved & MASK

    return store(form, run)


def minmax(form: Form) -> Step:
    cast = integers(form)

    def run(warp: Warp) -> Value:
        x, y, least = cast(form.data[0](warp)), cast(form.data[1](warp)), form.conditions[0](warp)
        return np.where(least, np.minimum(x, y), np.maximum(x, y)) if known(x, y, least) else UNKNOWN

    return store(form, run)


def absolute(form: Form) -> Step:
    def run(warp: Warp) -> Value:
        value = signed(form.data[0](warp) & MASK)
        return UNKNOWN if value is UNKNOWN else np.abs(value)

    return store(form, run)


def to_float(form: Form) -> Step:
    """I2F of 32 bits, as integer division uses it; .RP rounds up."""

    def run(warp: Warp) -> Value:
        value = form.data[0](warp)
        if (
            value is UNKNOWN
            or "F64" in form.item.modifiers
            or any("16" in m or "8" in m for m in form.item.modifiers)
        ):
            return UNKNOWN
        exact = (value if form.has("U32") else signed(value)).astype(np.float64)
        single = exact.astype(np.float32)
        if form.has("RP"):
            single = np.where(single < exact, np.nextafter(single, np.float32(np.inf)), single)
        return single.astype(np.float32).view(np.uint32).astype(np.int64)

    return store(form, run)


def to_int(form: Form) -> Step:
    """F2I of 32 bits, truncating."""

    def run(warp: Warp) -> Value:
        value = form.data[0](warp)
        if value is UNKNOWN or not form.has("TRUNC") or "F64" in form.item.modifiers:
            return UNKNOWN
        single = (value & MASK).astype(np.uint32).view(np.float32).astype(np.float64)
        low, most = (0, MASK) if form.has("U32") else (-(1 << 31), (1 << 31) - 1)
        return np.clip(np.nan_to_num(single), low, most).astype(np.int64)

    return store(form, run)


def reciprocal(form: Form) -> Step:
    """MUFU.RCP; the other functions are left unknown."""

    def run(warp: Warp) -> Value:
        value = form.data[0](warp)
        if value is UNKNOWN or form.item.modifiers != ("RCP",):
            return UNKNOWN
        with np.errstate(divide="ignore", over="ignore"):
            inverse = np.float32(1) / (value & MASK).astype(np.uint32).view(np.float32)
        return inverse.view(np.uint32).astype(np.int64)

    return store(form, run)
