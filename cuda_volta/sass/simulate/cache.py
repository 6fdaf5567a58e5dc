"""How much of a launch's global traffic L2 lacks, from the sectors that two neighbouring blocks touch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cuda_volta.sass.listing import Instruction
from cuda_volta.sass.paths import SKIPPED, Path
from cuda_volta.sass.paths.slices import GLOBAL
from cuda_volta.sass.paths.traffic import SECTOR

L2_BYTES = 6 * 1024 * 1024  # of a V100


class Traffic(NamedTuple):
    """Of one block, in bytes."""

    asked: int  # of L2
    shared: int  # distinct, and also touched by its neighbour
    private: int  # distinct, its own
    private_again: int  # of these, what it touches more than once

    def miss_share(self, resident: int, sharers: int) -> float:
        """The part of ``asked`` that comes from memory, ``resident`` blocks running on all SMs.

        ``sharers`` consecutive blocks touch the same ``shared`` bytes, each at its own time. What is touched
        first is missing once; a second touch finds it with the chance that the working set leaves it in L2,
        whose replacement is taken as random.
        """
        if not self.asked:
            return 0.0
        working_set = resident * (self.private_again + self.shared / sharers)
        first = self.private + self.shared / sharers
        evicted = max(0.0, 1 - L2_BYTES / working_set) if working_set else 0.0
        return min(1.0, (first + max(0.0, self.asked - first) * evicted) / self.asked)


def traffic(code: Sequence[Instruction], block: Sequence[Path], neighbour: Sequence[Path]) -> Traffic:
    """What the warps of a block ask of L2; ``neighbour`` is the next block of the launch."""
    is_global = np.array([item.base in GLOBAL for item in code])
    asked = sum(int(p.costs[is_global[p.indices] & (p.costs != SKIPPED)].sum()) for p in block)
    own, where = np.unique(np.concatenate([p.sectors for p in block]), return_inverse=True)
    touches = np.bincount(where, np.concatenate([p.touches for p in block]), len(own))
    common = np.isin(own, np.concatenate([p.sectors for p in neighbour]))
    again = int((~common & (touches > 1)).sum())
    return Traffic(SECTOR * asked, SECTOR * int(common.sum()), SECTOR * int((~common).sum()), SECTOR * again)
