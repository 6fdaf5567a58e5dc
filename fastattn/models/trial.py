"""A loaded model as `parallel.planner` runs it: forwards of one size, under any sync policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ..collectives.exchange import against_messages
from ..parallel.measure import Alone
from ..parallel.plan import PHASES
from ..parallel.schedule import Plain
from ..spec import Phase, Point, Schedule, SyncPolicy, UnsupportedError
from .generate import PREFILL_TOKENS, Model


class Trials:
    """Prefill of a prompt of ``prefill_tokens``, and a decode step of ``batch`` sequences after one.

    Token ids are drawn at random, the same on every rank: the arithmetic does not depend on them. Raises
    ValueError for sizes that do not fit the model's context, `CacheFull` for those that do not fit memory.

    For ranks that exchange messages over gloo: over NCCL and HCCL neither the model of time holds nor most
    candidates exist, and a clock of the host does not time a device (UnsupportedError).
    """

    def __init__(self, model: Model, prefill_tokens: int, batch: int) -> None:
        if reasons := against_messages(model.group):
            raise UnsupportedError(
                f"a plan cannot be measured: {'; '.join(reasons)}; name exact or tiled+exact instead"
            )
        config = model.config
        most = config.context - 1
        if not 2 <= prefill_tokens <= most:
            raise ValueError(f"prefill_tokens: {prefill_tokens}, expected 2 to {most}, the model's context")
        if batch < 1:
            raise ValueError(f"batch: {batch}, expected at least 1")
        self.model, self.num_layers, self.batch = model, config.num_layers, batch
        self.ids = torch.randint(
            config.vocab_size, (prefill_tokens,), generator=torch.Generator().manual_seed(0)
        )
        self._cache = model.kv_cache([prefill_tokens + 1] * (batch + 1))
        self._decoding = range(1, batch + 1)  # sequence 0 is prefilled
        alone = Alone()  # what the keys are costs nothing
        with deciding(model, lambda _: alone, dict.fromkeys(PHASES, Plain())):
            for seq in self._decoding:
                self._prefill(seq, self.ids)

    def rows(self, phase: Phase) -> Sequence[int]:
        """Rows of each forward: a prompt is cut as generation cuts it."""
        if phase == "decode":
            return (self.batch,)
        return [len(part) for part in self.ids.split(PREFILL_TOKENS)]

    def run(
        self,
        phase: Phase,
        policy: Callable[[Point], SyncPolicy],
        schedule: Schedule,
        prompt_tokens: int | None = None,
    ) -> None:
        """One prefill, by default of the whole prompt, or one decode step."""
        with deciding(self.model, policy, dict.fromkeys(PHASES, schedule)):
            if phase == "prefill":
                self._prefill(0, self.ids[:prompt_tokens])
            else:
                self._decode()

    @torch.inference_mode()
    def _prefill(self, seq: int, ids: torch.Tensor) -> None:
        if self._cache.length(seq):
            self._cache.free(seq)
        for part in ids.split(PREFILL_TOKENS):
            self.model.decoder.forward(part, self._cache.reserve([seq], [len(part)]), self._cache)

    @torch.inference_mode()
    def _decode(self) -> None:
        step = self._cache.reserve(self._decoding, [1] * self.batch)
        self.model.decoder.forward(self.ids[:1].expand(self.batch).contiguous(), step, self._cache)
        for seq in self._decoding:
            self._cache.truncate(seq, len(self.ids))


@contextmanager
def deciding(
    model: Model, policy: Callable[[Point], SyncPolicy], schedule: Mapping[Phase, Schedule]
) -> Iterator[None]:
    """Lets the model sum as ``policy`` and ``schedule`` say, for a while."""
    decoder = model.decoder
    before = decoder.policy, decoder.schedule
    decoder.policy, decoder.schedule = policy, schedule
    try:
        yield
    finally:
        decoder.policy, decoder.schedule = before
