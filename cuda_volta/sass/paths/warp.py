"""What a path keeps of one warp: registers, predicates, spilled values and the launch's constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cuda_volta.sass.paths.lanes import FALSE, TRUE, UNKNOWN, ZERO, Value, select, uniform

PARAMETERS = 0x160  # where a kernel's parameters begin in constant bank 0
_STACK = 0x28  # where bank 0 keeps the initial stack pointer
_STACK_TOP = 0xFFFC00


class Warp:
    """The state of 32 lanes. ``special`` maps "SR_TID.X" and the like to what each lane reads."""

    def __init__(
        self, parameters: bytes, literals: bytes, special: Mapping[str, Value],
        memory: Sequence[tuple[int, bytes]] = (), dimensions: bytes = b"",
    ) -> None:  # fmt: skip
        self.registers: list[Value] = [ZERO] * 258
        self.predicates: list[Value] = [FALSE] * 7 + [TRUE]
        self.local: dict[int, Value] = {}
        self.special = special
        bank0 = bytearray(PARAMETERS) + parameters
        bank0[: len(dimensions)] = dimensions  # blockDim, gridDim
        bank0[_STACK : _STACK + 4] = _STACK_TOP.to_bytes(4, "little")
        self._banks = {0: bytes(bank0), 2: literals}
        self._memory = memory
        self._constants: dict[tuple[int, int], Value] = {}

    def constant(self, bank: int, offset: int) -> Value:
        """A 32-bit constant; unknown outside of what the launch gives."""
        if (bank, offset) not in self._constants:
            word = self._banks.get(bank, b"")[offset : offset + 4]
            value = uniform(int.from_bytes(word, "little")) if len(word) == 4 else UNKNOWN
            self._constants[bank, offset] = value
        return self._constants[bank, offset]

    def load_constant(self, bank: int, offset: Value, size: int) -> Value:
        """``size`` bytes of a constant bank at one offset for all lanes; unknown where they differ."""
        if offset is UNKNOWN or (offset != offset[0]).any():
            return UNKNOWN
        data = self._banks.get(bank, b"")[int(offset[0]) : int(offset[0]) + size]
        return uniform(int.from_bytes(data, "little")) if len(data) == size else UNKNOWN

    def load_global(self, address: Value, size: int) -> Value:
        """``size`` bytes at each lane's address, where all lie in memory that the launch names."""
        if address is UNKNOWN:
            return UNKNOWN
        for start, data in self._memory:
            at = address - start
            if (at >= 0).all() and (at + size <= len(data)).all():
                return np.array([int.from_bytes(data[a : a + size], "little") for a in at.tolist()], np.int64)
        return UNKNOWN

    def set(self, register: int, value: Value, mask: Value) -> None:
        """Writes the lanes of ``mask``."""
        self.registers[register] = select(mask, value, self.registers[register])

    def set_predicate(self, number: int, value: Value, mask: Value) -> None:
        """Writes the lanes of ``mask``."""
        self.predicates[number] = select(mask, value, self.predicates[number])

    def packed_predicates(self, chosen: int) -> Value:
        """Those of P0 to P6 in the mask ``chosen`` as bits of an integer; unknown if any of them is."""
        total = ZERO
        for number in range(7):
            if chosen >> number & 1:
                value = self.predicates[number]
                total = total + (UNKNOWN if value is UNKNOWN else value.astype(np.int64) << number)
        return total
