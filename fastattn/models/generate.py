"""Batched generation: packed prefill of unequal prompts, then one token a sequence a step.

Every rank runs the same forwards. Rank 0 alone has the tokenizer's text, samples, and decides when a
sequence has ended; the others learn it from the tokens it broadcasts, where a negative one means ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ..collectives.prompts import broadcast_prompts, broadcast_tokens, refuse_prompts
from ..dispatch import pages
from ..memory.paged import PagedKvCache
from ..spec import TPGroup
from .config import ModelConfig
from .llama import Decoder
from .sampling import Sampler, SamplingParams, StopText
from .tokenizer import Tokenizer

PREFILL_TOKENS = 1024  # a forward: enough rows to saturate the GEMMs, few enough to show progress
_ENDED = -1

OnToken = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: str  # "stop" (end token or stop text) | "length"
    ttft_s: float  # from generate()'s start to this sequence's first token
    latency_s: float  # to its last


@dataclass
class Model:
    """A loaded model: config, tokenizer, this rank's decoder."""

    config: ModelConfig
    tokenizer: Tokenizer
    decoder: Decoder
    group: TPGroup
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """That this rank computes on."""
        return self.decoder.norm.weight.device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
        *,
        on_token: OnToken | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Completes every prompt (text, or token ids). Every rank calls it; rank 0's prompts count.

        ``on_token(sequence, token, text)`` is called on rank 0 as tokens come, an end token included;
        ``text`` is what became readable with it. Other ranks get completions without text, and without the
        token that completed a stop text.

        Raises ValueError for a prompt that is empty or longer than the model's context, and `CacheFull` when
        the KV cache of all prompts and completions cannot be allocated.
        """
        start = time.perf_counter()
        ids, budgets = self._share(prompts, params.max_tokens)
        if not ids:
            return []
        cache = self.kv_cache([len(p) + n for p, n in zip(ids, budgets, strict=True)])
        writer = _Writer(self, ids, params, start, on_token)
        hidden = self._prefill(ids, cache, progress and self.group.rank == 0)
        active = list(range(len(ids)))
        while True:
            tokens = self._next_tokens(hidden, active, writer, budgets)
            for seq, token in zip(active, tokens, strict=True):
                if token == _ENDED or len(writer.texts[seq].tokens) == budgets[seq]:
                    cache.free(seq)
            tokens = [t for s, t in zip(active, tokens, strict=True) if cache.length(s)]
            active = [s for s in active if cache.length(s)]
            if not active:
                return writer.completions()
            step = cache.reserve(active, [1] * len(active))
            hidden = self.decoder.forward(torch.tensor(tokens, device=self.device), step, cache)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[Sequence[int]], step: int | None = None) -> list[Tensor]:
        """Logits (len, vocab), float32 on the CPU, of every position of every sequence; only rank 0 has them.

        ``step``: tokens a forward, by default a whole sequence; a few run the kernels that generation runs.
        Every rank calls it; rank 0's sequences count. Raises as `generate` does.
        """
        if step is not None and step < 1:
            raise ValueError(f"step: {step}, expected at least 1")
        ids, _ = self._share(token_ids, 0)
        cache = self.kv_cache([len(p) for p in ids])
        results = []
        for seq, prompt in enumerate(ids):
            parts = []
            for piece in torch.tensor(prompt, device=self.device).split(step or len(prompt)):
                hidden = self.decoder.forward(piece, cache.reserve([seq], [len(piece)]), cache)
                rows = self.decoder.head(hidden)
                if rows is not None:
                    parts.append(rows.float().cpu())
            if parts:
                results.append(torch.cat(parts))
            cache.free(seq)
        return results

    def _share(self, prompts: Sequence[str | Sequence[int]], new: int) -> tuple[list[list[int]], list[int]]:
        """Token ids of each prompt and how many, up to ``new``, may follow: the same on every rank."""
        rows = None
        if self.group.rank == 0:
            try:
                if isinstance(prompts, str):
                    raise ValueError(f"prompts: the text {prompts!r:.40}, expected a list of prompts")  # noqa: TRY004
                ids = [self._encode(i, p, new) for i, p in enumerate(prompts)]
            except Exception:  # whatever it is, the ranks that wait must hear of it
                refuse_prompts(self.group)
                raise
            budgets = [min(new, self.config.max_position - len(p)) for p in ids]
            rows = [*ids, budgets]
        *ids, budgets = broadcast_prompts(self.group, rows)
        return ids, budgets

    def _encode(self, index: int, prompt: str | Sequence[int], new: int) -> list[int]:
        try:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(t) for t in prompt]
        except TypeError:
            raise ValueError(f"prompts[{index}]: {prompt!r:.40}, expected a text or token ids") from None
        context, vocab = self.config.max_position, self.config.vocab_size
        if not ids:
            raise ValueError(f"prompts[{index}]: no tokens, expected at least one")
        if len(ids) + min(new, 1) > context:
            raise ValueError(f"prompts[{index}]: {len(ids)} tokens, the model's context is {context}")
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"prompts[{index}]: token ids outside the vocabulary of {vocab}")
        return ids

    def kv_cache(self, lengths: Sequence[int]) -> PagedKvCache:
        """Room for sequences of so many tokens, in pages as the backend wants them. Raises CacheFull."""
        wanted = pages(self.device.type, self.config.head_dim)
        return PagedKvCache(
            self.config.num_layers, sum(-(-n // wanted.size) for n in lengths), wanted.size,
            self.decoder.blocks[0][0].kv_heads, self.config.head_dim, dtype=self.dtype, device=self.device,
            layout=wanted.layout,
        )  # fmt: skip

    def _prefill(self, ids: list[list[int]], cache: PagedKvCache, progress: bool) -> Tensor:
        """Hidden state of each prompt's last token (B, hidden); prompts in chunks, chunks packed."""
        last = [torch.empty(0)] * len(ids)
        total = sum(map(len, ids))
        bar = tqdm(total=total, desc="prefill", unit="tok", disable=not progress or total <= PREFILL_TOKENS)
        with bar:
            for chunk in chunks([len(p) for p in ids], PREFILL_TOKENS):
                step = cache.reserve([seq for seq, _, _ in chunk], [hi - lo for _, lo, hi in chunk])
                packed = [token for seq, lo, hi in chunk for token in ids[seq][lo:hi]]
                hidden = self.decoder.forward(torch.tensor(packed, device=self.device), step, cache)
                ends = step.cu_seqlens[1:].tolist()
                for (seq, _, hi), end in zip(chunk, ends, strict=True):
                    if hi == len(ids[seq]):
                        last[seq] = hidden[end - 1]
                bar.update(len(packed))
        return torch.stack(last)

    def _next_tokens(
        self, hidden: Tensor, active: list[int], writer: _Writer, budgets: list[int]
    ) -> list[int]:
        logits = self.decoder.head(hidden)
        tokens = None if logits is None else torch.tensor(writer.choose(logits, active, budgets))
        if self.group.world > 1:
            tokens = broadcast_tokens(self.group, tokens, len(active))
        assert tokens is not None
        chosen: list[int] = tokens.tolist()
        if self.group.rank != 0:
            writer.record(active, chosen)
        return chosen


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


class _Writer:
    """Samples, detokenizes, stops and times the sequences of a batch."""

    def __init__(
        self,
        model: Model,
        ids: list[list[int]],
        params: SamplingParams,
        start: float,
        on_token: OnToken | None,
    ) -> None:
        self._ids, self._params, self._start, self._on_token = ids, params, start, on_token
        self._eos = frozenset() if params.ignore_eos else frozenset(model.config.eos_ids)
        self._sample = Sampler(params, len(ids))
        self.texts = []
        for _ in ids:
            stream = model.tokenizer.stream()
            self.texts.append(_Text(stream.push, stream.flush, StopText(params.stop)))

    def choose(self, logits: Tensor, active: list[int], budgets: list[int]) -> list[int]:
        """Samples the next token of each active sequence; _ENDED where it ended before its budget."""
        chosen = self._sample(logits, active)
        return [self._take(seq, t, budgets[seq]) for seq, t in zip(active, chosen, strict=True)]

    def record(self, active: list[int], tokens: list[int]) -> None:
        """What a rank that does not sample keeps: the tokens."""
        for seq, token in zip(active, tokens, strict=True):
            self._clock(self.texts[seq])
            if token == _ENDED:
                self.texts[seq].finish_reason = "stop"
            else:
                self.texts[seq].tokens.append(token)

    def _take(self, seq: int, token: int, budget: int) -> int:
        entry = self.texts[seq]
        self._clock(entry)
        if token in self._eos:
            entry.finish_reason = "stop"
            self._show(entry, seq, token, entry.flush(), last=True)
            return _ENDED
        entry.tokens.append(token)
        last = len(entry.tokens) == budget
        text = entry.stream(token) + (entry.flush() if last else "")
        self._show(entry, seq, token, text, last)
        if entry.stop.stopped:
            entry.finish_reason = "stop"
            return _ENDED
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
            for ids, t in zip(self._ids, self.texts, strict=True)
        ]


def chunks(lengths: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Forwards of at most ``limit`` tokens, each a list of (sequence, first, one past last)."""
    forwards: list[list[tuple[int, int, int]]] = [[]]
    room = limit
    for seq, length in enumerate(lengths):
        lo = 0
        while lo < length:
            if room == 0:
                forwards.append([])
                room = limit
            hi = min(length, lo + room)
            forwards[-1].append((seq, lo, hi))
            room -= hi - lo
            lo = hi
    return forwards
