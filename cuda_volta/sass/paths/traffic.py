"""What an access of a warp costs the memory pipeline, from its lanes' addresses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BANKS = 32  # of 4 bytes
SECTOR = 32  # bytes


def wavefronts(addresses: npt.NDArray[np.int64], size: int, lanes: npt.NDArray[np.int64]) -> int:
    """Cycles of shared memory for the ``size`` bytes at each of ``lanes``.

    4 bytes or fewer: all lanes at once; 8: half warps; 16: quarters. In each of these a bank delivers one word.
    """
    together = min(32, 128 // size)
    total = 0
    for first in range(0, 32, together):
        chosen = addresses[(lanes >= first) & (lanes < first + together)]
        if len(chosen):
            words = np.unique(np.concatenate([chosen // 4 + word for word in range(max(1, size // 4))]))
            total += int(np.bincount(words % _BANKS).max())
    return total


def sectors(addresses: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """The distinct sectors of 32 bytes of global memory that the lanes touch."""
    return np.unique(np.concatenate([addresses // SECTOR, (addresses + (size - 1)) // SECTOR]))
