"""What the integer instructions compute, for the 32 lanes of a warp; every other result is unknown.

No manual states these semantics: they follow the PTX ISA's counterparts and how the compiler uses each form.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence

import numpy as np

from cuda_volta.sass.listing import Instruction
from cuda_volta.sass.paths import operands as ops
from cuda_volta.sass.paths.lanes import (
    MASK, TRUE, UNKNOWN, WARP, ZERO, Value, known, select, signed, uniform, unsigned_shift,
)  # fmt: skip
from cuda_volta.sass.paths.warp import Warp

Step = Callable[[Warp, Value], None]  # (state, lanes that execute it)
_COMPARE = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq,
    "NE": operator.ne,
}  # fmt: skip
_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


class _Form:
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


def step(item: Instruction) -> Step:
    """What executing ``item`` does to a warp."""
    form = _Form(item)
    compute = _OPS.get(item.base)
    if compute is not None:
        return compute(form)
    return _forget(form)


def _forget(form: _Form) -> Step:
    """Its results are unknown."""
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        for number in range(first, first + count):
            warp.set(number, UNKNOWN, mask)
        for number in form.written:
            warp.set_predicate(number, UNKNOWN, mask)

    return run


def _store(
    form: _Form, value: Callable[[Warp], Value], carry: Callable[[Value], Value] | None = None
) -> Step:
    """Writes the low 32 bits of a value, and its carry as a predicate if there is one to write."""

    def run(warp: Warp, mask: Value) -> None:
        full = value(warp)
        if form.register:
            warp.set(form.register[0], full & MASK, mask)
        for number in form.written:
            warp.set_predicate(number, UNKNOWN if carry is None or full is UNKNOWN else carry(full), mask)

    return run


def _carried(total: Value) -> Value:
    return total > MASK


def _mov(form: _Form) -> Step:
    return _store(form, form.data[0])


def _add(form: _Form) -> Step:
    return _store(form, lambda w: sum((d(w) for d in form.data), ZERO) + form.carry_in(w), _carried)


def _imad(form: _Form) -> Step:
    a, b, c = form.data[:3]
    cast = (lambda v: v & MASK) if form.has("U32") else (lambda v: signed(v & MASK))
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
        return _store(form, lambda w: ((cast(a(w)) * cast(b(w))) >> 32) + c(w) + form.carry_in(w))
    return _store(form, lambda w: (a(w) & MASK) * (b(w) & MASK) + c(w) + form.carry_in(w))


def _lea(form: _Form) -> Step:
    shift = int(form.texts[[i for i, t in enumerate(form.texts) if not ops.is_predicate(t)][-1]], 16)
    data = form.data[:-1]
    if not form.has("HI"):
        return _store(
            form, lambda w: ((data[0](w) << shift) & MASK) + (data[1](w) & MASK) + form.carry_in(w), _carried
        )

    def high(warp: Warp) -> Value:
        low = data[0](warp) & MASK
        if form.has("SX32"):
            wide = signed(low)
        else:
            up = data[2](warp) & MASK
            wide = low + (up << 32) if known(low, up) else UNKNOWN
        return unsigned_or_signed(wide, 32 - shift, form.has("SX32")) + data[1](warp) + form.carry_in(warp)

    return _store(form, high, _carried)


def unsigned_or_signed(value: Value, count: int, arithmetic: bool) -> Value:
    """A right shift of 64 bits by a literal."""
    return value >> count if arithmetic else unsigned_shift(value, np.full(WARP, count, np.int64))


def _shift(form: _Form) -> Step:
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

    return _store(form, run)


def _logic(form: _Form) -> Step:
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

    return _store(form, run, lambda v: v != 0)


def _predicate_logic(form: _Form) -> Step:
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


def _compare(form: _Form) -> Step:
    names, modifiers = form.item.operands[:2], form.item.modifiers
    test, combine = _COMPARE[modifiers[0]], _COMBINE[next(m for m in modifiers if m in _COMBINE)]
    a, b = form.data[:2]
    cast = (lambda v: v & MASK) if form.has("U32") else (lambda v: signed(v & MASK))

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


def _select(form: _Form) -> Step:
    return _store(form, lambda w: select(form.conditions[0](w), form.data[0](w), form.data[1](w)))


def _minmax(form: _Form) -> Step:
    cast = (lambda v: v & MASK) if form.has("U32") else (lambda v: signed(v & MASK))

    def run(warp: Warp) -> Value:
        x, y, least = cast(form.data[0](warp)), cast(form.data[1](warp)), form.conditions[0](warp)
        return np.where(least, np.minimum(x, y), np.maximum(x, y)) if known(x, y, least) else UNKNOWN

    return _store(form, run)


def _absolute(form: _Form) -> Step:
    def run(warp: Warp) -> Value:
        value = signed(form.data[0](warp) & MASK)
        return UNKNOWN if value is UNKNOWN else np.abs(value)

    return _store(form, run)


def _permute(form: _Form) -> Step:
    a, selector, b = form.data[:3]
    if form.item.modifiers:
        return _forget(form)

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

    return _store(form, run)


def _special(form: _Form) -> Step:
    name = form.item.operands[1]
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        value = ZERO if name == "SRZ" else warp.special.get(name, UNKNOWN)
        for number in range(first, first + count):
            warp.set(number, value if number == first or name == "SRZ" else UNKNOWN, mask)

    return run


def _shuffle(form: _Form) -> Step:
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

    return _store(form, run)


def _vote(form: _Form) -> Step:
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


def _to_register(form: _Form) -> Step:
    """P2R: the predicates under a mask into a byte of a register."""
    shift = next((8 * int(m[1]) for t in form.item.operands for m in re.findall(r"\.(B\d)", t)), 0)
    base = ops.source(re.sub(r"\.B\d", "", form.texts[1]))
    chosen = form.texts[2]

    def run(warp: Warp) -> Value:
        bits = int(chosen, 16) << shift
        return (base(warp) & (MASK ^ bits)) | ((warp.packed_predicates() << shift) & bits)

    return _store(form, run)


def _to_predicates(form: _Form) -> Step:
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


def _load_constant(form: _Form) -> Step:
    bank, offset = ops.constant_address(form.item.operands[1])
    size = next((int(m[1:]) // 8 for m in form.item.modifiers if m in ("U8", "U16")), 4)
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        for word in range(count):
            warp.set(first + word, warp.load_constant(bank, offset(warp) + 4 * word, size), mask)

    return run


def _load_global(form: _Form) -> Step:
    at = ops.address(form.item)
    size = next((int(m[1:]) // 8 for m in form.item.modifiers if m in ("U8", "U16")), 4)
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        for word in range(count):
            warp.set(first + word, warp.load_global(at(warp) + 4 * word, size), mask)

    return run


def _load_local(form: _Form) -> Step:
    at = ops.address(form.item)
    first, count = form.register or (0, 0)

    def run(warp: Warp, mask: Value) -> None:
        where = at(warp)
        for word in range(count):
            value = UNKNOWN if where is UNKNOWN else warp.local.get(int(where[0]) + 4 * word, UNKNOWN)
            warp.set(first + word, value, mask)

    return run


def _store_local(form: _Form) -> Step:
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


def _to_float(form: _Form) -> Step:
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

    return _store(form, run)


def _to_int(form: _Form) -> Step:
    """F2I of 32 bits, truncating."""

    def run(warp: Warp) -> Value:
        value = form.data[0](warp)
        if value is UNKNOWN or not form.has("TRUNC") or "F64" in form.item.modifiers:
            return UNKNOWN
        single = (value & MASK).astype(np.uint32).view(np.float32).astype(np.float64)
        low, most = (0, MASK) if form.has("U32") else (-(1 << 31), (1 << 31) - 1)
        return np.clip(np.nan_to_num(single), low, most).astype(np.int64)

    return _store(form, run)


def _reciprocal(form: _Form) -> Step:
    """MUFU.RCP; the other functions are left unknown."""

    def run(warp: Warp) -> Value:
        value = form.data[0](warp)
        if value is UNKNOWN or form.item.modifiers != ("RCP",):
            return UNKNOWN
        with np.errstate(divide="ignore"):
            inverse = np.float32(1) / (value & MASK).astype(np.uint32).view(np.float32)
        return inverse.view(np.uint32).astype(np.int64)

    return _store(form, run)


_OPS: dict[str, Callable[[_Form], Step]] = {
    "MOV": _mov, "IADD3": _add, "IMAD": _imad, "LEA": _lea, "SHF": _shift, "LOP3": _logic, "PLOP3": _predicate_logic,
    "ISETP": _compare, "SEL": _select, "IMNMX": _minmax, "IABS": _absolute, "PRMT": _permute, "S2R": _special,
    "CS2R": _special, "SHFL": _shuffle, "VOTE": _vote, "P2R": _to_register, "R2P": _to_predicates,
    "LDC": _load_constant, "LDG": _load_global, "LD": _load_global, "LDL": _load_local, "STL": _store_local,
    "I2F": _to_float, "F2I": _to_int, "MUFU": _reciprocal,
}  # fmt: skip


def steps(code: Sequence[Instruction]) -> list[Step]:
    """The step of each instruction."""
    return [step(item) for item in code]
