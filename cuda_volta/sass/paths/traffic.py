"""What an access of a warp costs the memory pipeline, from its lanes' addresses."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

_BANKS = 32  # of 4 bytes
_ROW = 4 * _BANKS  # bytes after which the banks repeat
SECTOR = 32  # bytes


def wavefronts(addresses: npt.NDArray[np.int64], size: int, lanes: npt.NDArray[np.bool_]) -> int:
    """Cycles of shared memory for the ``size`` bytes at the addresses of ``lanes``.

    4 bytes or fewer: all lanes at once; 8: half warps; 16: quarters. In each of these a bank delivers one
    word.
    """
    start = int(addresses[0]) // _ROW * _ROW
    return _wavefronts((addresses - start).tobytes(), size, lanes.tobytes())


def sectors(
    addresses: npt.NDArray[np.int64], size: int, lanes: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """The distinct sectors of 32 bytes of global memory that ``lanes`` touch."""
    start = int(addresses[0]) // SECTOR
    return start + _sectors((addresses - start * SECTOR).tobytes(), size, lanes.tobytes())


# A kernel's accesses fall into few patterns, apart from where they begin.
@functools.lru_cache(maxsize=65536)
def _wavefronts(relative: bytes, size: int, mask: bytes) -> int:
    addresses, lanes = np.frombuffer(relative, np.int64), np.frombuffer(mask, np.bool_)
    together = min(32, 128 // size)
    total = 0
    for first in range(0, 32, together):
        chosen = addresses[first : first + together][lanes[first : first + together]]
        if len(chosen):
            words = np.unique(np.concatenate([chosen // 4 + word for word in range(max(1, size // 4))]))
            total += int(np.bincount(words % _BANKS).max())
    return total


@functools.lru_cache(maxsize=65536)
def _sectors(relative: bytes, size: int, mask: bytes) -> npt.NDArray[np.int64]:
    chosen = np.frombuffer(relative, np.int64)[np.frombuffer(mask, np.bool_)]
    return np.unique(np.concatenate([chosen // SECTOR, (chosen + (size - 1)) // SECTOR]))
