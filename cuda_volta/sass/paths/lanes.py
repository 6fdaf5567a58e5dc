"""Values of the 32 lanes of a warp: arrays of integers or booleans, or unknown."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

WARP = 32
MASK = 0xFFFFFFFF
Ints: TypeAlias = npt.NDArray[np.int64]  # 32-bit register contents as 0 .. 2^32 - 1
Bools: TypeAlias = npt.NDArray[np.bool_]


class Unknown:
    """Depends on data that is not modelled; whatever is computed from it is unknown as well."""

    __array_ufunc__ = None  # so that an array on the left lets this class answer

    def _absorb(self, *_: object) -> Unknown:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _absorb
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = _absorb
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __invert__ = _absorb
    __eq__ = __ne__ = _absorb  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: Any) -> Any:
        """False where the other side is False, whatever this is."""
        return other if isinstance(other, np.ndarray) and not other.any() else self

    def __or__(self, other: Any) -> Any:
        """True where the other side is True in every lane."""
        known = isinstance(other, np.ndarray) and other.dtype == np.bool_ and bool(other.all())
        return other if known else self

    __rand__ = __and__
    __ror__ = __or__


UNKNOWN = Unknown()
Value: TypeAlias = Any  # Ints, Bools or Unknown
ZERO: Ints = np.zeros(WARP, np.int64)
FALSE: Bools = np.zeros(WARP, np.bool_)
TRUE: Bools = np.ones(WARP, np.bool_)


def known(*values: Value) -> bool:
    """Is none of them unknown?"""
    return all(v is not UNKNOWN for v in values)


def uniform(value: int) -> Ints:
    """The same 32 bits in every lane."""
    return np.full(WARP, value & MASK, np.int64)


def signed(value: Value) -> Value:
    """32-bit contents as a signed integer."""
    return value if value is UNKNOWN else ((value + 0x80000000) & MASK) - 0x80000000


def unsigned_shift(value: Value, count: Value) -> Value:
    """A logical right shift of 64-bit contents."""
    if not known(value, count):
        return UNKNOWN
    return (value.view(np.uint64) >> count.view(np.uint64)).view(np.int64)


def select(condition: Value, yes: Value, no: Value) -> Value:
    """Lane by lane; unknown if any lane that counts is."""
    if condition is TRUE or (yes is UNKNOWN and no is UNKNOWN):
        return yes
    if condition is UNKNOWN:
        return UNKNOWN
    if condition.all():
        return yes
    if not condition.any():
        return no
    return np.where(condition, yes, no) if known(yes, no) else UNKNOWN
