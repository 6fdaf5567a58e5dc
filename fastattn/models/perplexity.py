"""Perplexity of a model on a text: its chunks, the likelihood of their tokens, how much two models differ.

The text is cut into chunks, evenly over it, each begun as texts begin. Of each chunk the second half is
scored, so that every scored token has between half and all of the context before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .generate import Model
    from .tokenizer import Tokenizer


def chunks(tokenizer: Tokenizer, text: str, context: int, count: int) -> list[list[int]]:
    """``count`` pieces of ``text`` of ``context`` tokens, evenly over it, none over another.

    Raises ValueError when the text has too few tokens.
    """
    tokens = tokenizer.encode(text, add_special=False)
    length = context - len(tokenizer.begin)
    if count < 1 or length < 2 or count * length > len(tokens):
        raise ValueError(f"text: {len(tokens)} tokens, too few for {count} chunks of {context}")
    step = (len(tokens) - length) / max(1, count - 1)
    return [[*tokenizer.begin, *tokens[int(i * step) : int(i * step) + length]] for i in range(count)]


def nll(model: Model, ids: Sequence[Sequence[int]], step: int | None = None) -> Tensor:
    """Negative log-likelihood, in nats, of each token in the second half of each chunk: float64 (n,).

    ``step``: as of `Model.logits`. Every rank calls it; rank 0 has the result, others get (0,).
    """
    parts = [token_nll(*found) for chunk in ids if (found := predictions(model, chunk, step)) is not None]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


@torch.inference_mode()
def predictions(model: Model, chunk: Sequence[int], step: int | None = None) -> tuple[Tensor, Tensor] | None:
    """Log-probabilities (n, vocab) for, and ids (n,) of, the tokens in a chunk's second half; rank 0's."""
    half = len(chunk) // 2
    logits = model.logits([chunk], step)
    return (logits[0][half - 1 : -1].log_softmax(-1), torch.tensor(chunk[half:])) if logits else None


def token_nll(logp: Tensor, targets: Tensor) -> Tensor:
    """float64 (n,) of log-probabilities (n, vocab) and the tokens (n,) that came."""
    return -logp.gather(1, targets[:, None])[:, 0].double()


class Perplexity(NamedTuple):
    """``exp`` of the mean negative log-likelihood, and its standard error."""

    value: float
    error: float


def perplexity(losses: Tensor) -> Perplexity:
    """Of the result of `nll`. The error comes from the spread of the tokens' likelihoods."""
    value = math.exp(float(losses.mean()))
    return Perplexity(value, value * _standard_error(losses))


def change(losses: Tensor, base: Tensor) -> Perplexity:
    """Perplexity over that of ``base`` on the same tokens, minus 1; the error is of the paired difference."""
    difference = losses - base
    ratio = math.exp(float(difference.mean()))
    return Perplexity(ratio - 1, ratio * _standard_error(difference))


def _standard_error(x: Tensor) -> float:
    return float(x.std(correction=0)) / math.sqrt(len(x))
