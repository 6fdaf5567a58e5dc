"""Batched generation: packed prefill of unequal prompts, then one token a sequence a step.

Every rank runs the same forwards. Rank 0 alone has the tokenizer's text, samples, and decides when a
sequence has ended; the others learn it from the tokens it broadcasts, where a negative one means ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ..collectives.failures import everywhere
from ..collectives.prompts import broadcast_prompts, broadcast_tokens, choosing_tokens, preparing_prompts
from ..dispatch import pages
from ..memory.paged import PagedKvCache
from ..spec import CacheFull, TPGroup
from .completion import ENDED, Completion, OnToken, Writer
from .config import ModelConfig
from .llama import Decoder
from .sampling import LogitsError, SamplingParams
from .tokenizer import Tokenizer

PREFILL_TOKENS = 1024  # a forward: enough rows to saturate the GEMMs, few enough to show progress


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
        ``text`` is what became readable with it. Where it raises, the others raise ValueError. They get
        completions without text, and without the token that completed a stop text.

        Raises ValueError for a prompt that is empty or longer than the model's context, `CacheFull` when the
        KV cache of all prompts and completions cannot be allocated, and `LogitsError`.
        """
        start = time.perf_counter()
        ids, budgets = self._share(prompts, params.max_tokens)
        if not ids:
            return []
        cache = self.kv_cache([len(p) + n for p, n in zip(ids, budgets, strict=True)])
        batch = _Batch(ids, budgets, cache, Writer(self.tokenizer, ids, params, start, on_token))
        hidden = self._prefill(batch, progress and self.group.rank == 0)
        active = list(range(len(ids)))
        chosen = self._sampled(hidden, active, batch.writer)
        while True:
            tokens = self._agreed(chosen, active, batch)
            for seq, token in zip(active, tokens, strict=True):
                if token == ENDED or len(batch.writer.tokens(seq)) == budgets[seq]:
                    cache.free(seq)
            tokens = [t for s, t in zip(active, tokens, strict=True) if cache.length(s)]
            active = [s for s in active if cache.length(s)]
            if not active:
                return batch.writer.completions()
            chosen = self._step(tokens, active, batch, greedy=params.temperature == 0)

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
                view = cache.reserve([seq], [len(piece)])
                hidden = self.decoder.forward(piece, view, cache, [len(prompt)])
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
            with preparing_prompts(self.group):
                if isinstance(prompts, str):
                    raise ValueError(f"prompts: the text {prompts!r:.40}, expected a list of prompts")  # noqa: TRY004
                ids = [self._encode(i, p, new) for i, p in enumerate(prompts)]
            budgets = [min(new, self.config.context - len(p)) for p in ids]
            rows = [*ids, budgets]
        *ids, budgets = broadcast_prompts(self.group, rows)
        return ids, budgets

    def _encode(self, number: int, prompt: str | Sequence[int], new: int) -> list[int]:
        try:
            ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [index(t) for t in prompt]
        except TypeError:
            raise ValueError(f"prompts[{number}]: {prompt!r:.40}, expected a text or token ids") from None
        context, vocab = self.config.context, self.config.vocab_size
        if not ids:
            raise ValueError(f"prompts[{number}]: no tokens, expected at least one")
        if len(ids) + min(new, 1) > context:
            raise ValueError(f"prompts[{number}]: {len(ids)} tokens, the model's context is {context}")
        if not 0 <= min(ids) <= max(ids) < vocab:
            raise ValueError(f"prompts[{number}]: token ids outside the vocabulary of {vocab}")
        return ids

    def kv_cache(self, lengths: Sequence[int]) -> PagedKvCache:
        """Room for sequences of so many tokens, in pages as the backend wants them. Every rank calls it.

        Raises CacheFull on all ranks where one of them has too little memory.
        """
        features = frozenset({"window"} if any(self.config.windows) else ())
        wanted = pages(self.device.type, self.config.head_dim, self.dtype, features)
        with everywhere(self.group, CacheFull, "the KV cache"):
            return PagedKvCache(
                self.config.num_layers, sum(-(-n // wanted.size) for n in lengths), wanted.size,
                self.decoder.blocks[0][0].kv_heads, self.config.head_dim, dtype=self.dtype,
                device=self.device, layout=wanted.layout,
            )  # fmt: skip

    def _prefill(self, batch: _Batch, progress: bool) -> Tensor:
        """Hidden state of each prompt's last token (B, hidden); prompts in chunks, chunks packed."""
        ids, last = batch.ids, [torch.empty(0)] * len(batch.ids)
        total = sum(map(len, ids))
        bar = tqdm(total=total, desc="prefill", unit="tok", disable=not progress or total <= PREFILL_TOKENS)
        with bar:
            for chunk in chunks([len(p) for p in ids], PREFILL_TOKENS):
                step = batch.cache.reserve([seq for seq, _, _ in chunk], [hi - lo for _, lo, hi in chunk])
                packed = torch.tensor([t for seq, lo, hi in chunk for t in ids[seq][lo:hi]])
                hidden = self.decoder.forward(
                    packed.to(self.device), step, batch.cache, batch.lengths(step.seqs)
                )
                ends = step.cu_seqlens[1:].tolist()
                for (seq, _, hi), end in zip(chunk, ends, strict=True):
                    if hi == len(ids[seq]):
                        last[seq] = hidden[end - 1]
                bar.update(len(packed))
        return torch.stack(last)

    def _step(self, tokens: list[int], active: list[int], batch: _Batch, *, greedy: bool) -> list[int] | None:
        """The next token of each active sequence after ``tokens``; None on all ranks but 0."""
        ids, step = torch.tensor(tokens, device=self.device), batch.cache.reserve(active, [1] * len(active))
        lengths = batch.lengths(active)
        best = self.decoder.next_tokens(ids, step, batch.cache, lengths) if greedy else None
        if best is None:
            hidden = self.decoder.forward(ids, step, batch.cache, lengths)
            return self._sampled(hidden, active, batch.writer)
        tokens = best.tolist()
        for seq, token in zip(active, tokens, strict=True):
            if token < 0:  # on every rank
                raise LogitsError(seq)
        return tokens if self.group.rank == 0 else None

    def _sampled(self, hidden: Tensor, active: list[int], writer: Writer) -> list[int] | None:
        logits = self.decoder.head(hidden)
        if logits is None:
            return None
        with choosing_tokens(self.group, len(active)):
            return writer.sample(logits, active)

    def _agreed(self, chosen: list[int] | None, active: list[int], batch: _Batch) -> list[int]:
        """What rank 0 made of the tokens that it chose, on every rank."""
        tokens = None
        if chosen is not None:
            with choosing_tokens(self.group, len(active)):
                tokens = batch.writer.take(active, chosen, batch.budgets)
        if self.group.world > 1:
            sent = None if tokens is None else torch.tensor(tokens)
            tokens = broadcast_tokens(self.group, sent, len(active)).tolist()
            if self.group.rank != 0:
                batch.writer.record(active, tokens)
        assert tokens is not None
        return tokens


class _Batch(NamedTuple):
    """The sequences of one call of `generate`."""

    ids: list[list[int]]  # of the prompts
    budgets: list[int]  # tokens that may follow
    cache: PagedKvCache
    writer: Writer

    def lengths(self, seqs: Sequence[int]) -> list[int]:
        """That these sequences may reach."""
        return [len(self.ids[seq]) + self.budgets[seq] for seq in seqs]


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
