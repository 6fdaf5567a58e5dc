"""What lossy sync policies cost in quality: perplexity on a text against exact sums, on the running ranks."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ..collectives.exact import Exact
from ..collectives.exchange import broadcast, device_of
from ..collectives.prompts import broadcast_prompts
from ..parallel.candidates import Candidate
from ..parallel.plan import PHASES
from ..parallel.schedule import Plain
from .generate import Model
from .perplexity import Perplexity, change, nll, perplexity
from .trial import deciding

_CALIBRATION = 8  # chunks at most: outliers show in a few thousand tokens
_Z = 1.645  # one-sided 95 %


class Quality:
    """The text, and its likelihood under exact sums.

    ``ids``: at least two chunks of the text (`perplexity.chunks`), of rank 0, None of others: every other
    one is scored, those between are for calibration. ``max_increase``: of the
    perplexity, relative, that a plan may cost; the upper end of its 95 % confidence interval counts.
    """

    def __init__(self, model: Model, ids: Sequence[Sequence[int]] | None, max_increase: float) -> None:
        if not 0 < max_increase < float("inf"):
            raise ValueError(f"max_increase: {max_increase}, expected a positive share of the perplexity")
        self.model, self.max_increase = model, max_increase
        everything = broadcast_prompts(model.group, ids)
        if len(everything) < 2:
            raise ValueError(f"ids: {len(everything)} chunks, expected at least 2")
        self.ids, self.calibration = everything[::2], everything[1::2][:_CALIBRATION]
        exact = Candidate.uniform(Exact(model.dtype.itemsize), Plain(), model.config.num_layers)
        self._exact = self._nll(exact, self.ids)
        #: Perplexity under exact sums.
        self.exact = self._shared(perplexity(self._exact) if model.group.rank == 0 else None)

    @property
    def digest(self) -> str:
        """SHA-256 of the scored chunks' token ids."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        """That are scored."""
        return sum(len(chunk) - len(chunk) // 2 for chunk in self.ids)

    def increase(self, c: Candidate) -> Perplexity:
        """The share by which perplexity grows under the candidate's policies, and its standard error."""
        found = self._nll(c, self.ids)
        return self._shared(change(found, self._exact) if self.model.group.rank == 0 else None)

    def upper(self, increase: Perplexity) -> float:
        """The upper end of its 95 % confidence interval."""
        return increase.value + _Z * increase.error

    def keeps(self, increase: Perplexity) -> bool:
        """Whether that is within the bound."""
        return self.upper(increase) <= self.max_increase

    def differences(self, varied: Sequence[Candidate], base: Candidate) -> list[float]:
        """By which share the perplexity of each is above that of ``base``, on a quarter of the chunks."""
        ids, rank = self.ids[: max(1, len(self.ids) // 4)], self.model.group.rank
        losses, found = self._nll(base, ids), []
        for c in tqdm(varied, desc="sensitivity", unit="point", disable=rank != 0 or not sys.stderr.isatty()):
            own = self._nll(c, ids)
            found.append(self._shared(change(own, losses) if rank == 0 else None).value)
        return found

    def _nll(self, c: Candidate, ids: Sequence[Sequence[int]]) -> Tensor:
        schedules = dict.fromkeys(PHASES, Plain())
        with deciding(self.model, c.policy, schedules):
            return nll(self.model, ids)

    def _shared(self, mine: Perplexity | None) -> Perplexity:
        """Rank 0's, on every rank."""
        values = torch.tensor(mine or (0.0, 0.0), dtype=torch.float64, device=device_of(self.model.group))
        broadcast(self.model.group, values, "perplexity from rank 0")
        return Perplexity(*values.tolist())
