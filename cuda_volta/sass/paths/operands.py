"""Operands of machine code: what they name, and how their values are fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from cuda_volta.sass.listing import Instruction
from cuda_volta.sass.paths.lanes import FALSE, MASK, TRUE, UNKNOWN, WARP, ZERO, Value, uniform

if TYPE_CHECKING:
    from cuda_volta.sass.paths.warp import Warp

Fetch = Callable[["Warp"], Value]

REGISTER = re.compile(r"(?<![\w.])R(\d+)")
_PREDICATE = re.compile(r"(?<![\w.])P(\d)")
_SOURCE = re.compile(
    r"(-|~)?(\|)?(?:R(\d+|Z)|c\[(0x\w+)\]\[(?:R(\d+|Z)\+?)?(-?0x\w+|)\]|(0x\w+))\|?((?:\.\w+)*)"
)
_CONSTANT_ADDRESS = re.compile(r"c\[(0x\w+)\]\[(?:R(\d+|Z))?\+?(-?0x\w+)?\]")
_ADDRESS = re.compile(r"\[(?:R(\d+|Z)((?:\.\w+)*))?\+?(-?0x\w+)?\]")
_WIDTH = {"64": 2, "128": 4}
_PAIRS = ("DADD", "DMUL", "DFMA", "CS2R", "HMMA")
_NO_RESULT = (
    "ST", "STG", "STS", "STL", "RED", "BRA", "BRX", "EXIT", "BAR", "BSSY", "BSYNC", "NOP", "RET", "CALL",
    "WARPSYNC", "MEMBAR", "DEPBAR", "CCTL", "KILL", "ERRBAR", "BMOV", "YIELD", "BREAK",
)  # fmt: skip


def is_predicate(text: str) -> bool:
    """Is it "P0", "!P0", "PT" or "!PT"?"""
    bare = text.lstrip("!")
    return bare == "PT" or bool(re.fullmatch(r"P\d", bare))


def destinations(item: Instruction) -> tuple[tuple[int, int] | None, tuple[int, ...], int]:
    """(first register and how many, predicates written, number of operands that are destinations).

    An opcode whose first operand is a predicate and the second a register (SHFL, some LOP3) writes both.
    """
    if item.base == "R2P":
        mask = int(item.operands[2], 16)
        return None, tuple(p for p in range(7) if mask >> p & 1), 0
    if item.base in _NO_RESULT:
        return None, (), 0
    predicates: list[int] = []
    register: tuple[int, int] | None = None
    count = 0
    for text in item.operands:
        plain = text.removesuffix(".reuse")
        if is_predicate(plain) and not plain.startswith("!") and count < _written_predicates(item):
            if plain != "PT":
                predicates.append(int(plain[1:]))
            count += 1
        elif (
            register is None
            and item.base not in ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3")
            and re.fullmatch(r"R(\d+|Z)", plain)
        ):
            register = (-1 if plain == "RZ" else int(plain[1:]), _results(item))
            count += 1
            if item.base not in ("IADD3", "LEA", "IMAD"):
                break
        else:
            break
    return (register if register and register[0] >= 0 else None), tuple(predicates), count


def _written_predicates(item: Instruction) -> int:
    """How many leading operands may be predicates that it writes, the register counted."""
    if item.base in ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3"):
        return 2
    if item.base in ("IADD3", "LEA", "IMAD"):
        return 0 if item.operands[:1] == () else 3
    return 1 if item.base in ("SHFL", "LOP3", "VOTE", "LDG", "ATOMG", "ATOM", "FCHK", "MUFU") else 0


def _results(item: Instruction) -> int:
    """Registers that the result takes."""
    modifiers = item.modifiers
    if item.base == "CS2R" and "32" in modifiers:
        return 1
    if (
        item.base in _PAIRS
        or (item.base == "IMAD" and "WIDE" in modifiers)
        or (item.base == "F2F" and modifiers[:1] == ("F64",))
    ):
        return 2
    return next((_WIDTH[m] for m in modifiers if m in _WIDTH), 1) if item.base.startswith("LD") else 1


def sources(item: Instruction) -> tuple[set[int], set[int]]:
    """The registers and predicates that an instruction reads, its guard among them; pairs count whole."""
    registers: set[int] = set()
    predicates: set[int] = set()
    if item.guard and not item.guard.endswith("PT"):
        predicates.add(int(item.guard[-1]))
    _, _, count = destinations(item)
    wide = item.base == "IMAD" and "WIDE" in item.modifiers
    for position, text in enumerate(item.operands[count:]):
        if is_predicate(text):
            predicates |= {int(p) for p in _PREDICATE.findall(text)}
            continue
        for number in map(int, REGISTER.findall(text)):
            registers.add(number)
            pair = text.startswith("[") and "E" in item.modifiers
            # The addend of a wide multiply-add, a 64-bit address and a return address take two registers.
            if pair or (wide and position == 2) or item.base == "RET":
                registers.add(number + 1)
            if item.base == "STL" and not text.startswith("["):
                registers |= set(
                    range(number, number + next((_WIDTH[m] for m in item.modifiers if m in _WIDTH), 1))
                )
    if item.base == "P2R":
        predicates |= set(range(7))
    return registers, predicates


def source(text: str) -> Fetch:
    """Fetches a 32-bit operand: a register, a constant or a literal, with its sign and complement."""
    found = _SOURCE.fullmatch(text)
    if not found or any(m not in ("", "reuse") for m in found[8].split(".")) or found[2]:
        return lambda _: UNKNOWN
    if found[7]:
        return _literal(int(found[7], 16), found[1])
    if found[4] and found[5]:
        return lambda _: UNKNOWN
    plain = _constant(int(found[4], 16), int(found[6] or "0", 16)) if found[4] else _register(found[3])
    if found[1] == "-":
        # Not reduced to 32 bits: the carry of a + (2^32 - b) is that of the subtraction.
        return lambda warp: (MASK + 1) - plain(warp)
    if found[1] == "~":
        return lambda warp: MASK - plain(warp)
    return plain


def _literal(value: int, sign: str | None) -> Fetch:
    fixed = uniform(-value if sign == "-" else ~value if sign == "~" else value)
    return lambda _: fixed


def _constant(bank: int, offset: int) -> Fetch:
    return lambda warp: warp.constant(bank, offset)


def _register(name: str) -> Fetch:
    """By its number, or "Z"."""
    if name == "Z":
        return lambda _: ZERO
    number = int(name)
    return lambda warp: warp.registers[number]


def single(text: str) -> Fetch:
    """Fetches a float32 operand as float64 values: a register, a constant or a literal like "-INF"."""
    found = re.fullmatch(r"(-)?(\|)?([^|]+)\|?", text.removesuffix(".reuse"))
    assert found  # every text but an empty one
    sign, absolute = -1.0 if found[1] else 1.0, bool(found[2])
    with suppress(ValueError):
        literal = np.full(WARP, sign * float(found[3]))
        return lambda _: literal
    bits = source(found[3])

    def fetch(warp: Warp) -> Value:
        held = bits(warp)
        if held is UNKNOWN:
            return UNKNOWN
        value = held.astype(np.uint32).view(np.float32).astype(np.float64)
        return sign * (np.abs(value) if absolute else value)

    return fetch


def high(text: str) -> Fetch:
    """Fetches the upper half of a register pair or of a 64-bit constant."""
    plain = text.removesuffix(".reuse")
    if plain == "RZ":
        return lambda _: ZERO
    if re.fullmatch(r"R\d+", plain):
        number = int(plain[1:]) + 1
        return lambda warp: warp.registers[number]
    if found := re.fullmatch(r"c\[(0x\w+)\]\[(0x\w+)\]", plain):
        bank, offset = int(found[1], 16), int(found[2], 16) + 4
        return lambda warp: warp.constant(bank, offset)
    return lambda _: UNKNOWN


def predicate(text: str) -> Fetch:
    """Fetches a predicate operand, negated or not."""
    bare = text.lstrip("!")
    if bare == "PT":
        value = FALSE if text.startswith("!") else TRUE
        return lambda _: value
    number = int(bare[1:])
    if text.startswith("!"):
        return lambda warp: ~warp.predicates[number]
    return lambda warp: warp.predicates[number]


def address(item: Instruction) -> Fetch:
    """Fetches the byte address of a load or store, 64 bits of it where the instruction has an .E."""
    text = next(t for t in item.operands if t.startswith("["))
    found = _ADDRESS.fullmatch(text)
    if not found:
        return lambda _: UNKNOWN
    offset = int(found[3] or "0", 16)
    if found[1] in (None, "Z"):
        fixed = uniform(offset)
        return lambda _: fixed
    number = int(found[1])
    scale = next((int(m[1:]) for m in found[2].split(".") if m.startswith("X")), 1)
    if "E" in item.modifiers and "U32" not in found[2]:
        return lambda warp: warp.registers[number] + (warp.registers[number + 1] << 32) + offset
    return lambda warp: (warp.registers[number] * scale + offset) & MASK


def constant_address(text: str) -> tuple[int, Fetch]:
    """Bank and byte offset of the constant that an LDC loads."""
    found = _CONSTANT_ADDRESS.fullmatch(text)
    if not found:
        return 0, lambda _: UNKNOWN
    offset = int(found[3] or "0", 16)
    if found[2] in (None, "Z"):
        fixed = uniform(offset)
        return int(found[1], 16), lambda _: fixed
    number = int(found[2])
    return int(found[1], 16), lambda warp: (warp.registers[number] + offset) & MASK


def registers_of(first: int, count: int) -> Iterator[int]:
    """A result's registers."""
    yield from range(first, first + count)
