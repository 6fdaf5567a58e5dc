"""The completions of a batch as they grow: sampled, detokenized, stopped and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .sampling import Sampler, SamplingParams, StopText
from .tokenizer import Tokenizer

ENDED = -1  # in place of a token: the sequence has none left to come

#: Called with (sequence, token, text).
OnToken = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str  # as it goes on after the prompt's
    finish_reason: str  # "stop" (end token or stop text) | "length"
    ttft_s: float  # from generate()'s start to this sequence's first token
    latency_s: float  # to its last


@dataclass
class _Text:
    """One completion as it grows."""

    stream: Callable[[int], str]
    flush: Callable[[], str]
    stop: StopText
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"
    ttft_s: float = 0.0
    latency_s: float = 0.0


class Writer:
    """Samples, detokenizes, stops and times the sequences of a batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        ids: list[list[int]],
        params: SamplingParams,
        start: float,
        on_token: OnToken | None,
    ) -> None:
        self._ids, self._start, self._on_token = ids, start, on_token
        self._eos = frozenset() if params.ignore_eos else frozenset(tokenizer.eos_ids)
        self._sample = Sampler(params, len(ids))
        self._texts = []
        for prompt in ids:
            stream = tokenizer.stream(prompt)
            self._texts.append(_Text(stream.push, stream.flush, StopText(params.stop)))

    def tokens(self, seq: int) -> list[int]:
        """What sequence ``seq`` has so far."""
        return self._texts[seq].tokens

    def sample(self, logits: Tensor, active: list[int]) -> list[int]:
        """The next token of each active sequence."""
        return self._sample(logits, active)

    def take(self, active: list[int], tokens: list[int], budgets: list[int]) -> list[int]:
        """The tokens, now part of their sequences; ENDED where one ended before its budget."""
        return [self._take(seq, t, budgets[seq]) for seq, t in zip(active, tokens, strict=True)]

    def record(self, active: list[int], tokens: list[int]) -> None:
        """What a rank that does not sample keeps: the tokens that `take` returned on rank 0."""
        for seq, token in zip(active, tokens, strict=True):
            self._clock(self._texts[seq])
            if token == ENDED:
                self._texts[seq].finish_reason = "stop"
            else:
                self._texts[seq].tokens.append(token)

    def _take(self, seq: int, token: int, budget: int) -> int:
        entry = self._texts[seq]
        self._clock(entry)
        if token in self._eos:
            entry.finish_reason = "stop"
            self._show(entry, seq, token, entry.flush(), last=True)
            return ENDED
        entry.tokens.append(token)
        last = len(entry.tokens) == budget
        text = entry.stream(token) + (entry.flush() if last else "")
        self._show(entry, seq, token, text, last)
        if entry.stop.stopped:
            entry.finish_reason = "stop"
            return ENDED
        return token

    def _show(self, entry: _Text, seq: int, token: int, text: str, last: bool) -> None:
        text = entry.stop.push(text, last)
        entry.text += text
        if self._on_token is not None:
            self._on_token(seq, token, text)

    def _clock(self, entry: _Text) -> None:
        entry.latency_s = time.perf_counter() - self._start
        entry.ttft_s = entry.ttft_s or entry.latency_s

    def completions(self) -> list[Completion]:
        return [
            Completion(ids, t.tokens, t.text, t.finish_reason, t.ttft_s, t.latency_s)
            for ids, t in zip(self._ids, self._texts, strict=True)
        ]
